"""Put the C kernel into the wheel, compiled: for Linux, on the levels of x86-64 and on aarch64.

Zig's C compiler is a Python package, compiles for either machine on any, and links to symbols of
glibc 2.17, which every manylinux2014 system has. FULLATTN_WHEEL chooses the wheel: `x86_64`,
`aarch64`, or `any`, which carries no kernel; without it the wheel is for this machine.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# By machine: the kernel's name in the wheel, and what the compiler calls its processor.
KERNELS = {
    "x86_64": {
        "x86-64-v2": "x86_64_v2",
        "x86-64-v3": "x86_64_v3",
        "x86-64-v4": "x86_64_v4",
    },
    "aarch64": {"aarch64": "generic"},
}
GLIBC = "2.17"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-s")


def compile_for(
    target: str, processor: str, sources: list[Path], output: Path, flags: Sequence[str]
) -> None:
    """Compile C files for a system and processor; the compiler's cache is thrown away."""
    with tempfile.TemporaryDirectory(prefix="zig-") as cache:
        subprocess.run(
            [
                *(sys.executable, "-m", "ziglang", "cc", *FLAGS, *flags),
                *("-target", target, f"-mcpu={processor}"),
                *(*map(str, sources), "-o", str(output)),
            ],
            env={"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache, **os.environ},
            check=True,
        )


def chosen() -> str:
    """Return the machine that the wheel is for, or `any`."""
    asked = os.environ.get("FULLATTN_WHEEL", "")
    if asked not in ("", "any", *KERNELS):
        raise ValueError(f"FULLATTN_WHEEL is any, {' or '.join(KERNELS)}, not {asked!r}")
    here = platform.machine() if sys.platform == "linux" else "any"
    return asked or (here if here in KERNELS else "any")


class KernelHook(BuildHookInterface[Any]):
    """Compile `native.c` for every processor of the wheel's machine."""

    def dependencies(self) -> list[str]:
        """Ask for a compiler only if something is compiled."""
        return [] if chosen() == "any" else ["ziglang>=0.14"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the kernels and the wheel's tag; an editable installation compiles on first use."""
        machine = chosen()
        if version == "editable" or machine == "any":
            return
        if importlib.util.find_spec("ziglang") is None:
            if os.environ.get("FULLATTN_WHEEL"):
                raise RuntimeError(f"a wheel for {machine} needs the package ziglang")
            self.app.display_warning("no package ziglang: the wheel carries no compiled kernel")
            return
        source = Path(self.root) / "src" / "fullattn" / "attention" / "native.c"
        self.compiled = tempfile.TemporaryDirectory(prefix="fullattn-kernels-")
        for name, processor in KERNELS[machine].items():
            library = Path(self.compiled.name) / f"native-{name}.so"
            compile_for(f"{machine}-linux-gnu.{GLIBC}", processor, [source], library, ["-shared"])
            build_data["force_include"][str(library)] = f"fullattn/attention/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{GLIBC.replace('.', '_')}_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled: the wheel has it."""
        if hasattr(self, "compiled"):
            self.compiled.cleanup()
