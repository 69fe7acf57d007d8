"""What the outside sees: the names, what an import brings in, and how long it takes."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from torch import nn

import fullattn
from helpers.processes import run_program

# Seconds that `import fullattn` may add to `import torch, einops`.
IMPORT_SECONDS = 0.15


def printed_by(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_public_names() -> None:
    assert sorted(fullattn.__all__) == [
        "BackendError",
        "ChannelNonLocal",
        "FullyAttentional",
        "SpatialNonLocal",
        "attention",
        "backend",
        "checkpoints",
        "costs",
        "data",
        "evaluation",
        "functional",
        "insert",
        "integrations",
        "layers",
        "models",
        "plot",
        "remove",
        "replay",
        "reshape",
        "segmentation",
        "swap",
    ]
    for name in fullattn.__all__:
        assert getattr(fullattn, name) is not None
    assert fullattn.__version__
    assert dir(fullattn) == sorted([*fullattn.__all__, "__version__"])


def test_dir_lists_what_the_reference_documents() -> None:
    pages = Path(__file__).parents[1].joinpath("docs", "reference").glob("*.md")
    text = "".join(page.read_text() for page in pages)
    documented = set(re.findall(r"^::: fullattn\.(\w+)", text, re.MULTILINE))
    assert len(documented) > 10
    assert documented <= set(dir(fullattn))


def test_modules_are_there_when_they_are_asked_for() -> None:
    lazy = "data evaluation models plot segmentation"
    loaded, *after = printed_by(
        "import sys, fullattn\n"
        f"print(any(f'fullattn.{{name}}' in sys.modules for name in {lazy.split()}))\n"
        f"print(*(getattr(fullattn, name).__name__ for name in {lazy.split()}))"
    )
    assert loaded == "False"  # the import of fullattn is quick because it leaves them out
    assert after == [f"fullattn.{name}" for name in lazy.split()]


def test_help_needs_no_extra() -> None:
    names = printed_by(
        "import sys; sys.modules['matplotlib'] = sys.modules['PIL'] = None\n"
        "import fullattn, pydoc\n"
        "assert 'SpatialNonLocal' in pydoc.render_doc(fullattn)\n"
        "print(*dir(fullattn))"
    )
    assert {*names, "data", "plot"} == {*fullattn.__all__, "__version__"}
    assert not {"data", "plot"} & set(names)


def test_every_name_in_all_exists_and_has_a_docstring() -> None:
    for found in pkgutil.walk_packages(fullattn.__path__, "fullattn."):
        if found.name.startswith(("fullattn.bench", "fullattn._cli.main", "fullattn.__main__")):
            continue  # these need the bench extra
        module = import_module(found.name)
        assert module.__doc__, found.name
        for name in getattr(module, "__all__", ()):
            public = getattr(module, name)
            if inspect.isfunction(public) or inspect.isclass(public):
                assert public.__doc__, f"{found.name}.{name}"


@pytest.mark.parametrize("name", ["ChannelNonLocal", "FullyAttentional", "SpatialNonLocal"])
def test_layers_are_modules_whose_options_are_keywords(name: str) -> None:
    layer = getattr(fullattn, name)
    assert issubclass(layer, nn.Module)
    first, *options = inspect.signature(layer).parameters.values()
    assert first.name == "channels"
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)
    assert all(option.default is not inspect.Parameter.empty for option in options)
    assert {option.name for option in options} >= {"backend", "device", "dtype", "scale"}


def test_import_brings_in_nothing_but_torch_einops_and_the_standard_library() -> None:
    added = printed_by(
        "import sys, torch, einops\n"
        "before = set(sys.modules)\n"
        "import fullattn\n"
        "print(*set(sys.modules) - before)"
    )
    roots = {name.partition(".")[0] for name in added}
    assert "fullattn" in roots
    assert roots - {"fullattn", "torch", "einops"} <= sys.stdlib_module_names
    assert not {name for name in added if name.startswith(("fullattn.bench", "fullattn._cli.main"))}


@pytest.mark.slow
def test_import_is_quick(tmp_path: Path) -> None:
    program = (
        "import gc, sys, time\n"
        f"sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}\n"
        "gc.disable()\n"  # of PyTorch's objects; where a collection falls is chance
        "start = time.process_time()\n"
        "import fullattn\n"
        "print(time.process_time() - start)"
    )
    # Processor time, since other programs are at work too. Noise only ever adds, so one run within
    # the limit shows that the import is. As an installed package has them, the first run writes the
    # files of bytecode.
    times: list[float] = []
    while len(times) < 7 and min(times, default=1.0) > IMPORT_SECONDS:
        done = run_program(program, setup="import torch, einops")
        times.append(float(done.stdout))
    assert min(times) <= IMPORT_SECONDS, times


@pytest.mark.parametrize(
    ("pretend", "sentence"),
    [
        ("import torch; torch.__version__ = '2.3.1+cpu'", "PyTorch 2.4 or later, found 2.3.1+cpu"),
        ("import sys, torch; sys.version_info = (3, 9, 18)", "Python 3.10 or later"),
    ],
)
def test_a_version_that_is_too_old_is_refused_in_one_sentence(pretend: str, sentence: str) -> None:
    done = run_program(f"{pretend}\nimport fullattn")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: fullattn needs {sentence}"
