"""The files a bundle is installed with: scripts and readmes, filled in from bundle.json's facts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_TEMPLATES = _HERE / "templates"
_BOM = "\ufeff"
_UNIX = {
    "INSTALL_ZH": "在此处打开终端，输入：sh install.sh",
    "INSTALL_EN": "Open a terminal here and type: sh install.sh",
    "START_ZH": "输入安装结束时显示的启动命令，或在应用程序菜单中打开“PediatricsGPT 儿科助手”。",
    "START_EN": "Type the command that the installer names at its end, or open it in the menu of applications.",
}
_MACOS = {
    **_UNIX,
    "START_ZH": "输入安装结束时显示的启动命令。",
    "START_EN": "Type the command that the installer names at its end.",
}
_WINDOWS = {
    "INSTALL_ZH": "双击 install.bat。",
    "INSTALL_EN": "Double-click install.bat.",
    "START_ZH": "在“开始”菜单中打开 PediatricsGPT。",
    "START_EN": "Open PediatricsGPT in the start menu.",
}
_NEWER = ("3.11", "3.12", "3.13", "3.14")


def installer_files(facts: dict[str, Any], room: int) -> dict[str, bytes]:
    """Name in the bundle → content. `room`: bytes that an installation takes at most."""
    windows = facts["platform"].startswith("windows-")
    values = _values(facts, room, windows)
    files = {name: (_HERE / name).read_bytes() for name in ("installer.py", "start.py")}
    if windows:
        files["install.ps1"] = _filled("install.ps1", values, crlf=True)
        files["install.bat"] = _filled("install.bat", values, crlf=True)
    else:
        files["install.sh"] = _filled("install.sh", values)
    # Notepad wants CR LF, and the mark before Chinese text.
    files["说明.txt"] = _filled("readme.zh.txt", values, crlf=True, mark=_BOM)
    files["README.txt"] = _filled("readme.en.txt", values, crlf=True)
    return files


def _filled(template: str, values: dict[str, str], crlf: bool = False, mark: str = "") -> bytes:
    text = re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], (_TEMPLATES / template).read_text(encoding="utf-8"))
    return (mark + (text.replace("\n", "\r\n") if crlf else text)).encode("utf-8")


def _values(facts: dict[str, Any], room: int, windows: bool) -> dict[str, str]:
    pythons, requires = facts["python"], facts["requires"]
    steps = _WINDOWS if windows else _MACOS if facts["platform"].startswith("macos-") else _UNIX
    versions = ", ".join(f"({python.replace('.', ', ')})" for python in pythons)
    condition = f"(sys.version_info[:2] in ({versions},))" if pythons else "(sys.version_info >= (3, 11))"
    numbered = pythons or _NEWER
    if windows:
        candidates = ", ".join([*(f"@('py', '-{version}')" for version in numbered), "@('python')"])
    else:
        candidates = " ".join(["python3", *(f"python{version}" for version in numbered)])
    return {
        "CANDIDATES": candidates,
        "CONDITION": condition,
        "PYTHONS": " / ".join(pythons) or "3.11+",
        "PLATFORM": facts["platform"],
        "CPU": ", ".join(requires["cpu"]).upper() or "–",
        "DISK": f"{room / 2**20:.0f} MiB",
        "INSTALLER": "install.bat" if windows else "sh install.sh",
        **steps,
        **_warnings(facts["model"]),
        **_held(facts["app"], facts["model"]),
    }


def _held(app: dict[str, Any] | None, model: dict[str, Any] | None) -> dict[str, str]:
    chinese, english = [], []
    if app:
        chinese.append(f"程序 {app['version']}")
        english.append(f"app {app['version']}")
    if model:
        chinese.append(f"模型 {model['name']}（{model['file']}）")
        english.append(f"model {model['name']} ({model['file']})")
    return {"CONTENTS_ZH": "内容：" + "，".join(chinese), "CONTENTS_EN": "Holds: " + ", ".join(english)}


def _warnings(model: dict[str, Any] | None) -> dict[str, str]:
    if model is None or model["demonstration"]:
        return {
            "WARNING_ZH": "演示模型不能用于看病。",
            "WARNING_EN": "A demonstration model is not for clinical use.",
        }
    return {
        "WARNING_ZH": "回答由语言模型生成，未经核实；剂量请以所引资料为准。",
        "WARNING_EN": "Answers come from a language model and are not checked; take doses from the cited source.",
    }
