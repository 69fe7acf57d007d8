"""The files that are published: what is in them, and that they work where nothing else is."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fullattn.attention import native
from fullattn.functional import columns_and_rows
from helpers import ROOT

MISSING = [
    name for name in ("build", "auditwheel", "ziglang") if not importlib.util.find_spec(name)
]
pytestmark = [
    pytest.mark.wheels,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: make wheels"),
    pytest.mark.skipif(sys.platform != "linux", reason="the wheels with a kernel are for Linux"),
]

KERNELS = {
    "x86_64": {"native-x86-64-v2.so", "native-x86-64-v3.so", "native-x86-64-v4.so"},
    "aarch64": {"native-aarch64.so"},
    "any": set(),
}


def build(*arguments: str | Path, wheel: str = "any") -> None:
    """Run `python -m build` with what is installed."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *map(str, arguments)],
        env={**os.environ, "FULLATTN_WHEEL": wheel},
        check=True,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session", autouse=True)
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.getbasetemp() / "zig"))
        yield


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build("--sdist", "--outdir", folder, ROOT)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="session")
def wheels(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build every wheel from the source distribution, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("wheels")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    found = {}
    for machine in KERNELS:
        build("--wheel", "--outdir", folder / machine, source, wheel=machine)
        (found[machine],) = (folder / machine).iterdir()
    return found


def test_a_source_distribution_holds_the_source_alone(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "hatch_build.py", "LICENSE", "README.md"} <= set(names)
    assert "src/fullattn/attention/native.c" in names
    assert not [name for name in names if re.search(r"\.(so|pyc|npz|ckpt|pt)$", name)]


@pytest.mark.parametrize("machine", KERNELS)
def test_a_wheel_holds_the_package_and_its_machine_s_kernels(
    wheels: dict[str, Path], machine: str
) -> None:
    tag = "py3-none-any" if machine == "any" else f"py3-none-manylinux_2_17_{machine}"
    assert wheels[machine].name.endswith(f"-{tag}.whl")
    with zipfile.ZipFile(wheels[machine]) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        written = archive.read(record).decode()
    assert f"Tag: {tag}\n" in written
    assert f"Root-Is-Purelib: {str(machine == 'any').lower()}\n" in written
    package = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in package} == {"fullattn", "fullattn_cli.py"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT / "src", capture_output=True, text=True)
    if tracked.returncode == 0:
        added = {f"fullattn/attention/{name}" for name in KERNELS[machine]}
        assert package == set(tracked.stdout.split()) | added


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_auditwheel_finds_a_wheel_consistent_with_its_tag(
    wheels: dict[str, Path], machine: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheels[machine]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert f'is consistent with the following platform tag: "manylinux_2_17_{machine}"' in said


# Where nothing else is


@pytest.fixture(scope="session")
def clean(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Install the wheel of this machine; return the environment's Python.

    Its path has a space. What the package needs is this environment's: nothing is downloaded.
    """
    if platform.machine() not in KERNELS:
        pytest.skip(f"no wheel for {platform.machine()}")
    folder = tmp_path_factory.mktemp("a clean place")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (packages,) = folder.glob("env/lib/python*/site-packages")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"),
            *("--target", packages),
            wheels[platform.machine()],
        ],
        check=True,
    )
    # Behind its own site-packages; not processed further, so no editable fullattn.
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    for path in (packages / "fullattn").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield python
    for path in (packages / "fullattn").rglob("*"):
        path.chmod(0o755)


def started(python: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process outside the source tree that finds no compiler and has no home."""
    return subprocess.Popen(
        [python, *arguments],
        cwd=python.parents[2],
        env={"PATH": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text


TRY = """
import warnings; warnings.simplefilter("error")
import torch, fullattn
from fullattn.attention import native
x = torch.randn(2, 16, 9, 12, requires_grad=True)
for layer in (fullattn.FullyAttentional, fullattn.ChannelNonLocal, fullattn.SpatialNonLocal):
    layer = layer(16)
    if layer.gamma is not None:
        torch.nn.init.constant_(layer.gamma, 0.7)
    y = layer(x)
    y.sum().backward()
    with fullattn.backend("reference"):
        assert torch.allclose(y, layer(x), atol=1e-5), layer
assert "site-packages" in fullattn.__file__
print(native._kernel()._name)
"""


def test_layers_run_on_the_ready_kernel_in_several_new_processes(clean: Path) -> None:
    first = [started(clean, "-c", TRY) for _ in range(3)]
    names = {Path(said(process).strip()).name for process in first}
    assert names == {f"native-{native._levels()[0]}.so"}
    made = [path for path in clean.parents[2].rglob("*") if path.suffix in (".o", ".pyc")]
    assert not made


def test_info_names_the_kernel_as_what_would_run(clean: Path) -> None:
    text = said(started(clean, "-m", "fullattn", "info"))
    assert re.search(r"native", text)
    assert "needs a C compiler" not in text


def test_the_wheel_without_a_kernel_runs_the_next_backend(
    clean: Path, wheels: dict[str, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheels["any"]) as archive:
        archive.extractall(tmp_path / "any wheel")
    code = "import torch, fullattn; fullattn.FullyAttentional(8)(torch.randn(1, 8, 5, 6))\n"
    code += "from fullattn.attention import native\n"
    code += "print(fullattn.__file__, native._unavailable(), sep='\\n')"
    text = said(started(clean, "-c", code, PYTHONPATH=str(tmp_path / "any wheel")))
    where, why = text.splitlines()
    assert "any wheel" in where
    assert why.startswith("needs a C compiler")


# On processors that this machine may lack

EMULATORS = {"aarch64": "qemu-aarch64", "x86-64-v2": "qemu-x86_64", "x86-64-v3": "qemu-x86_64"}
SIZES = [(1, 16, 5, 4), (2, 37, 9, 13), (1, 70, 9, 17)]


def inputs(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return x, keys and the result's gradient: the numbers that `kernel.c` makes."""
    batch, channels, height, width = sizes
    state, found = 1, []
    shapes = [sizes, (batch, height, channels), (batch, width, channels), sizes]
    for shape in shapes:
        numbers = []
        for _ in range(torch.Size(shape).numel()):
            state = (state * 1664525 + 1013904223) % 2**32
            numbers.append((state >> 8) / 8388608 - 1)
        found.append(torch.tensor(numbers, dtype=torch.float64).reshape(shape))
    x, column_key, row_key, grad = found
    return x, column_key.mT.contiguous(), row_key.mT.contiguous(), grad


@pytest.mark.parametrize("processor", ["aarch64", *reversed(native._LEVELS)])
def test_a_processor_s_kernel_equals_the_definition_in_float64(
    processor: str, tmp_path: Path
) -> None:
    import hatch_build

    machine = "aarch64" if processor == "aarch64" else "x86_64"
    runner: list[str] = []
    if machine != platform.machine() or processor not in native._levels():
        emulator = shutil.which(EMULATORS.get(processor, ""))
        if emulator is None:
            pytest.skip(f"this processor is no {processor}, and no emulator of one is installed")
        runner = [emulator]
    program = tmp_path / "kernel"
    # For an emulator linked statically, which musl allows: it then needs no system of its own.
    system, flags = ("musl", ["-static"]) if runner else (f"gnu.{hatch_build.GLIBC}", [])
    hatch_build.compile_for(
        f"{machine}-linux-{system}",
        hatch_build.KERNELS[machine][processor],
        [Path(native.__file__).with_suffix(".c"), Path(__file__).with_name("kernel.c")],
        program,
        flags,
    )
    for sizes in SIZES:
        done = subprocess.run(
            [*runner, program, *map(str, sizes)], capture_output=True, text=True, check=True
        )
        x, column_key, row_key, grad = inputs(sizes)
        exact = [t.requires_grad_() for t in (x, column_key, row_key)]
        y = columns_and_rows(*exact, 0.5)
        expected = [y.detach(), *torch.autograd.grad(y, exact, grad)]
        found = torch.tensor([float(line) for line in done.stdout.split()], dtype=torch.float64)
        for one, other in zip(found.split([t.numel() for t in expected]), expected, strict=True):
            assert float((one - other.flatten()).abs().max()) < 2e-5 * float(other.abs().max())
