#!/bin/sh
# Installs PediatricsGPT from this folder, with no network:  sh install.sh   (--help shows the options)
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
for python in @CANDIDATES@; do
    if "$python" -c 'import sys; sys.exit(not @CONDITION@)' 2>/dev/null; then
        # The installer checks every file, this one too; what checks must itself be whole before it runs.
        "$python" -I -c '
import hashlib, sys
digest = hashlib.sha256(open(sys.argv[1] + "/installer.py", "rb").read()).hexdigest()
sums = open(sys.argv[1] + "/SHA256SUMS", encoding="utf-8", errors="replace").read().splitlines()
sys.exit(digest + "  installer.py" not in sums)
' "$here" || {
            echo "安装包中的文件已损坏：installer.py 或 SHA256SUMS。没有安装任何东西，请重新拷贝安装包。" >&2
            echo "installer.py or SHA256SUMS is damaged. Nothing was installed; copy the bundle again." >&2
            exit 2
        }
        exec "$python" -I -B "$here/installer.py" "$@"
    fi
done
echo "没有找到合适的 Python（需要 @PYTHONS@）。Debian/Ubuntu：sudo apt install python3 ；macOS：安装 python.org 的安装程序。" >&2
echo "No suitable Python was found (needed: @PYTHONS@). Debian 12, Ubuntu 24.04 and later: sudo apt install python3;" >&2
echo "macOS: the installer from python.org. Python is not part of this bundle." >&2
exit 2
