"""The platforms a bundle can be made for, and how llama.cpp is built to run on all of their machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMON = "-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"
# GGML_NATIVE=OFF alone drops even these when SOURCE_DATE_EPOCH is set, so they are named.
_AVX2 = "-DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"


@dataclass(frozen=True)
class Platform:
    """pip's names for a platform (oldest system first), the values of its markers, and its processor baseline.

    `cpu` uses the names of /proc/cpuinfo; `cmake` is the portable build of llama.cpp.
    """

    name: str
    tags: tuple[str, ...]
    markers: dict[str, str]
    cpu: tuple[str, ...]
    cmake: str

    def accepts(self, wheel_platform: str) -> bool:
        """Whether a wheel's platform tag fits: `any`, one of ours, or any Linux tag of the processor."""
        if self.name.startswith("linux-"):  # the glibc a wheel needs is read from its libraries, not from its tag
            machine = self.markers["platform_machine"]
            pattern = rf"any|(many)?linux(\d+|_\d+_\d+)?_{machine}"
            return re.fullmatch(pattern, wheel_platform) is not None
        return wheel_platform == "any" or wheel_platform in self.tags


def _linux(machine: str) -> Platform:
    # numpy's wheels set the floor: glibc 2.27 or 2.28.
    tags = ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28", "linux")
    markers = {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine}
    x86 = machine == "x86_64"
    return Platform(
        f"linux-{machine}",
        tuple(f"{tag}_{machine}" for tag in tags),
        markers,
        ("avx", "avx2", "bmi2", "f16c", "fma") if x86 else (),
        f"{_COMMON} {_AVX2}" if x86 else _COMMON,
    )


PLATFORMS = {
    platform.name: platform
    for platform in (
        _linux("x86_64"),
        _linux("aarch64"),
        Platform(
            "windows-x86_64",
            ("win_amd64",),
            {"os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"},
            ("avx", "avx2", "bmi2", "f16c", "fma"),
            f"{_COMMON} {_AVX2}",
        ),
        Platform(
            "macos-arm64",
            tuple(f"macosx_{major}_0_{kind}" for major in (11, 12, 13, 14) for kind in ("arm64", "universal2")),
            {"os_name": "posix", "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
            (),
            f"{_COMMON} -DGGML_METAL=OFF",
        ),
    )
}
