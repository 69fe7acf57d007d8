"""The documentation does what it says: every block of Python and every command of a shell runs.

Sybil finds the fenced blocks. Blocks of Python share the names of their page; `pycon` blocks are
also doctests (`--doctest-glob`), which compare what they print. A command runs in a folder of its
own with the files that it names; `SMALLER` replaces options that would take minutes or a GPU. A
command of a program that `PROGRAMS` does not have fails, so that nothing is left out silently.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib
import torch
from packaging.requirements import Requirement

from fullattn._cli.main import COMMANDS, main, parser_of
from helpers import ROOT, tiny_data, yolo
from helpers.networks import NEEDS, load, missing
from helpers.tiny_training import processes

sybil = pytest.importorskip("sybil")
lexers = pytest.importorskip("sybil.parsers.markdown.lexers")

PATHS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").rglob("README.md")),
]
LANGUAGES = ("pycon", "python", "sh", "text")
ISOLATED_PAGES = ("docs/guides/ultralytics.md",)
# Compiled ahead of time; the doctests of the page run with `make test`.
NETWORK_PAGES = ("docs/guides/export.md",)

# Text of a page's Python, and what runs in its place.
INSTEAD = {
    "docs/guides/flanet.md": {  # a ResNet-101 takes seconds; test_flanet has it
        "fullattn.models.FLANet(19)": "fullattn.models.FLANet(19, 'test_resnet', "
        "channels=8, out_channels=8)"
    },
    "docs/guides/replay.md": {  # test_rebuilt_networks trains, in a process of its own
        "trainer.fit(module, torch.utils.data.DataLoader(torch.randn(20, 3, 16, 16)))": (
            "trainer.strategy.connect(module)"
        )
    },
    "docs/guides/ultralytics.md": {"epochs=3": f"epochs=1, **{yolo.BATCH}"},
    "docs/guides/export.md": {  # compiling with optimisation takes half a minute
        'package_path="layer.pt2")': 'package_path="layer.pt2", inductor_configs={'
        '"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 1, "cpp.vec_isa_ok": True})'
    },
}

# Options of each command that are replaced where they are given, or added ("+").
_TIMES = {"+--repeats": "1", "+--no-memory": ""}
_CPU = {"--device": "cpu"}
SMALLER: dict[str, dict[str, str]] = {
    "bench": {**_TIMES, **_CPU, "+--shapes": "4x6x8"},
    "swap": {**_TIMES, **_CPU, "+--shape": "2x3x64x64"},
    "train": {
        "--precision": "32-true",
        "--strategy": "auto",
        "--devices": "1",
        "--nodes": "1",
        "--accumulate": "2",
        "+--set": "training.steps=2 training.batch_size=2 training.warmup_steps=0 "
        "training.sync_batchnorm=false training.precision=32-true training.strategy=auto "
        "training.average_decay=null data.crop=[24,32] data.workers=0 model.backbone=test_resnet "
        "model.backbone_options={} model.backbone_weights=null model.pretrained=false "
        "model.channels=8 model.out_channels=8 model.auxiliary_channels=8",
    },
    "evaluate": {**_CPU, "--window": "48x64", "--stride": "24x32", "--workers": "0"},
    "predict": {**_CPU, "--window": "240x320"},
    "maps": {"--backbone": "test_resnet --weights backbone.pth", "--weights": "backbone.pth"},
    "info": _CPU,
}

MODULES = {
    "my_block.py": "from torch import nn\nclass MyBlock(nn.Module):\n"
    "    def __init__(self, channels):\n        super().__init__()\n"
    "        self.convolution = nn.Conv2d(channels, channels, 1)\n"
    "    def forward(self, x):\n        return self.convolution(x)\n",
    "my_net.py": "from torch import nn\ndef Net():\n"
    "    backbone = nn.Sequential()\n    backbone.layer4 = nn.Conv2d(3, 8, 3, padding=1)\n"
    "    net = nn.Sequential()\n    net.backbone = backbone\n    return net\n",
}
DATA_SETS = {name: getattr(tiny_data, name) for name in ("camvid", "cityscapes", "ade20k", "voc")}
DATA_SETS["folder"] = tiny_data.folder


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its opening fence, from 1."""

    page: str
    line: int
    language: str
    text: str


def blocks_of(name: str, text: str) -> list[Block]:
    """Find the fenced blocks of a page, also in lists, quotations, admonitions and tabs."""
    lexer = lexers.RawFencedCodeBlockLexer(re.compile(r"(?P<language>\S*)[^\n]*\n"))
    document = sybil.Document(text, name)
    return [
        Block(
            name,
            text.count("\n", 0, region.start) + 1,
            region.lexemes["language"],
            str(region.lexemes["source"]),
        )
        for region in lexer(document)
    ]


PAGES = {
    (name := path.relative_to(ROOT).as_posix()): blocks_of(name, path.read_text("utf-8"))
    for path in PATHS
}


# What pages and commands name


def checkpoint(path: Path, data: str) -> None:
    """Write what `fullattn train` writes, for the smallest network with a data set's classes."""
    load("timm")
    from fullattn.segmentation.data import classes
    from fullattn.segmentation.models import FLANet
    from fullattn.segmentation.models.files import Description, describe

    known = classes.numbered(4) if data == "folder" else classes.known(data)
    network = FLANet(len(known.names), "test_resnet", channels=8, out_channels=8, auxiliary=False)
    half = (0.5, 0.5, 0.5)
    description = Description(
        describe(network), data, known.names, known.palette, known.groups, half, half
    )
    weights = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "fullattn": description.plain()}, path)


def official_weights(path: Path) -> None:
    load("timm")
    from fullattn import checkpoints, models

    network = models.FLANet(19, "test_resnet", channels=8, out_channels=8)
    torch.save(checkpoints.convert(network.state_dict(), "flanet", reverse=True), path)


def provide(name: str, data: str = "camvid") -> None:
    """Put the files of that name into the current folder, if they are among those below."""
    path = Path(name)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if (ROOT / path).is_file():
        shutil.copy(ROOT / path, path)
    elif path.suffix == ".jpg":
        picture = tiny_data.picture((480, 640), list(range(9)), np.random.default_rng(0))[0]
        for each in ("a", "b") if "*" in name else ("",):
            tiny_data.save(Path(name.replace("*", each)), picture)
    elif path.suffix == ".ckpt":
        checkpoint(path, data)
    elif path.name == "flanet_cityscapes.pth":
        official_weights(path)
    elif path.name == "yolo11n.pt":
        load("ultralytics").YOLO("yolo11n.yaml").save(path)
    elif path.name == "coco8.yaml":
        yolo.draw(Path("coco8").absolute()).rename(path)
    elif path.name == "backbone.pth":
        timm = load("timm")
        torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    elif name in MODULES:
        path.write_text(MODULES[name])


# Python


def run_python(page: str, blocks: list[Block]) -> None:
    """Run a page's blocks of python, and of pycon before them, in the current folder."""
    blocks = [block for block in blocks if block.language in ("python", "pycon")]
    while blocks and blocks[-1].language == "pycon":
        blocks.pop()  # doctests alone
    names: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for block in blocks:
        text = block.text
        for name in re.findall(r"""["']([\w./-]+\.\w+)["']""", text):
            provide(name)
        for path, name in re.findall(r"""["'](data/(\w+))["']""", text):
            if not Path(path).exists():
                DATA_SETS[name](Path(path))
        for old, new in INSTEAD.get(page, {}).items():
            text = text.replace(old, new)
        if block.language == "python":
            exec(compile("\n" * block.line + text, page, "exec", dont_inherit=True), names)
            continue
        for example in doctest.DocTestParser().get_examples(text):
            lines = "\n" * (block.line + example.lineno)
            code = compile(lines + example.source, page, "single", dont_inherit=True)
            raises = pytest.raises(Exception) if example.exc_msg else contextlib.nullcontext()  # noqa: PT011
            with contextlib.redirect_stdout(io.StringIO()), raises:
                exec(code, names)


@contextlib.contextmanager
def library_of(page: str) -> Iterator[None]:
    """Skip a page about a library that is not installed, as docs/conftest.py does."""
    stem = Path(page).stem
    name = runpy.run_path(str(ROOT / "docs" / "conftest.py"))["ABOUT"].get(stem, stem)
    with warnings.catch_warnings():
        if name in NEEDS:
            load(name)
            warnings.simplefilter("ignore")  # theirs
        yield


# Commands


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """Yield (place, command): continued lines joined, comments dropped, && divided."""
    first, text = 0, ""
    for number, line in enumerate([*block.text.splitlines(), ""], start=block.line + 1):
        first = first if text else number
        text += re.sub(
            r"""^((?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*)(?<!\S)#.*$""", r"\1", line
        ).strip()
        if text.endswith("\\"):
            text = f"{text[:-1].rstrip()} "
            continue
        yield from ((f"{block.page}:{first}", part.strip()) for part in text.split("&&") if part)
        text = ""


def run_command(command: str) -> None:
    """Run a command in the current folder, or check as much of it as can be checked here."""
    reader = shlex.shlex(command, posix=True, punctuation_chars=";<>|&$`")
    reader.whitespace_split, reader.commenters = True, ""
    words = list(reader)
    assert not any(word.strip(";<>|&$`") == "" for word in words), "only plain commands run here"
    environment = {}
    while re.match(r"[A-Z_]\w*=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    assert words[0] in PROGRAMS, f"unknown program {words[0]!r}; known are {', '.join(PROGRAMS)}"
    PROGRAMS[words[0]](words[1:], environment)


def run_fullattn(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Parse the arguments as they are, then run the command in small."""
    if arguments == ["--version"]:
        assert main(arguments) == 0
        return
    args = parser_of(*arguments[:1]).parse_args(arguments)
    if args.command == "yolo":
        run_yolo(arguments)
        return
    for text in [*(getattr(args, "shapes", None) or ()), getattr(args, "shape", None) or "4x4x4"]:
        from fullattn._cli.shapes import parse_shape

        parse_shape(text)
    words = made_small(args.command, prepared(args, arguments))
    if args.command == "train":  # Lightning leaves too much behind in a process
        child = processes().Process(target=call, args=(words, Path.cwd()))
        child.start()
        child.join(120)
        child.kill()
        child.join()
        assert child.exitcode == 0, (words, Path("said").read_text())
    elif environment:  # FULLATTN_BACKEND and others are read when the package is imported
        command = [sys.executable, "-m", "fullattn", *words]
        subprocess.run(command, env=os.environ | environment, check=True)
    else:
        assert main(words) == 0, words


def run_yolo(arguments: list[str]) -> None:
    """Run `fullattn yolo` in a process of its own, as it reads the process's arguments."""
    for _, _, value in (word.partition("=") for word in arguments):
        provide(value)
        if value == "yolo11n-fully.yaml":
            from ultralytics.nn.tasks import yaml_model_load
            from ultralytics.utils import YAML

            change = {"layer": "FullyAttentional", "after": 10}
            YAML.save(value, {**yaml_model_load("yolo11n.yaml"), "fullattn": [change]})
    small = [f"{name}={value}" for name, value in yolo.BATCH.items() if arguments[1] == "train"]
    words = [word for word in arguments if not word.startswith("epochs=")] + small
    program = (
        "import sys\nfrom helpers import yolo\nyolo.ready()\nfrom fullattn._cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    epochs = ["epochs=1"] * (arguments[1] == "train")
    command = [sys.executable, "-c", program, *words, *epochs]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)


def call(arguments: list[str], folder: Path) -> None:
    """Run `fullattn` as a process whose exit status is the command's."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.chdir(folder)
    with (
        Path("said").open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        sys.exit(main(arguments))


def prepared(args: argparse.Namespace, arguments: list[str]) -> list[str]:
    """Provide the files that a command names, below the current folder; return its arguments."""

    def below(path: object) -> str:
        return re.sub(r"^(?:~?/|(?:\.\./)+)", "", str(path))

    data = "camvid"
    if args.command in ("train", "evaluate", "predict"):
        load("timm")
    if args.command == "train":
        from fullattn.segmentation.training.config import read

        for package in ("lightning", "torchmetrics"):
            if reason := missing(package):
                pytest.skip(reason)
        provide(args.config)
        data = read(args.config, args.set).data.name
        DATA_SETS[data](Path(below(args.data)))
    if args.command == "evaluate":
        data, root = args.data
        DATA_SETS[data](Path(below(root)))
    if getattr(args, "compare", None):
        old = Path(below(args.compare))
        words = ["--shapes", "4x6x8", "--repeats", "1", "--no-memory", "--output", str(old.parent)]
        assert main(["bench", *words]) == 0
    if getattr(args, "backbone", None):
        provide("backbone.pth")
        assert load("timm").is_model(args.backbone), f"timm has no {args.backbone}"
    words = []
    for word in map(below, arguments):
        if (package := re.split("[.:]", word)[0]) in NEEDS and ":" in word:
            load(package)
        provide(word.rpartition(":")[0] or word, data)
        words += (sorted(glob(word)) if "*" in word else []) or [word]
    return words


def made_small(name: str, words: list[str]) -> list[str]:
    """Replace and add the options of `SMALLER`."""
    for option, values in SMALLER[name].items():
        bare = option.removeprefix("+")
        at = [i for i, word in enumerate(words) if word.split("=")[0] == bare and bare != "--set"]
        if at:
            end = at[0] + 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            words = [*words[: at[0]], bare, *values.split(), *words[end:]]
        elif option != bare:
            words = [*words, bare, *values.split()]
    return words


def run_torchrun(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Parse the options with torchrun's own parser; run once what it starts everywhere."""
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(arguments)
    assert args.module
    assert args.training_script == "fullattn"
    run_fullattn(args.training_script_args, environment)


def check_make(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Check that the targets exist and that the Makefile uses the variables."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for name in [word.partition("=")[0] for word in arguments if "=" in word] + [*environment]:
        assert re.search(rf"\$\({name}\)|\b{name}[?]?=|\b{name} [?]?=", makefile), name
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def check_pip(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Check that this package with existing extras, or its dependencies, are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {Requirement(each).name for several in extras.values() for each in several} | {
        Requirement(each).name for each in project["dependencies"]
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["install"])
    parser.add_argument("-e", "--editable", "-U", "--upgrade", "-q", action="store_true")
    parser.add_argument("-c", "-r", type=lambda name: (ROOT / name).read_text(), dest="files")
    parser.add_argument("--index-url")
    parser.add_argument("packages", nargs="+")
    for word in parser.parse_args(arguments).packages:
        found = Requirement(re.sub(r"^\.(?=\[|$)", "fullattn", word))
        assert found.name in known | {"fullattn"}, word
        if found.name == "fullattn":
            assert found.extras <= set(extras), word


class _Accepted(BaseException):
    """A script's parser has accepted its arguments."""


def check_script(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Parse a script's arguments with its own parser; run nothing after that."""
    if arguments[0] == "-m":
        PROGRAMS[arguments[1]](arguments[2:], environment)
        return
    script, real = ROOT / arguments[0], argparse.ArgumentParser.parse_args
    assert script.is_file(), script

    def parse(parser: argparse.ArgumentParser, *given: Any, **options: Any) -> Any:
        real(parser, *given, **options)
        raise _Accepted

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(sys, "argv", [str(script)])  # scripts may read it when imported
        spec = importlib.util.spec_from_file_location(f"_script_{script.stem}", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, module.__name__, module)  # for dataclasses
        spec.loader.exec_module(module)
        patch.setattr(sys, "argv", [str(script), *arguments[1:]])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(_Accepted):
            module.main()


def check_git(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Accept a clone, without fetching anything."""
    assert arguments[0] == "clone"
    assert len(arguments) in (2, 3)


PROGRAMS: dict[str, Callable[[list[str], Mapping[str, str]], None]] = {
    "fullattn": run_fullattn,
    "torchrun": run_torchrun,
    "make": check_make,
    "pip": check_pip,
    "python": check_script,
    "git": check_git,
    "cd": lambda arguments, environment: None,
}


# The tests


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # `fullattn` looks for modules where it runs
    monkeypatch.setenv("MPLBACKEND", "agg")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def with_blocks(*languages: str) -> Any:
    """Parametrise over the pages that have blocks of these languages."""
    return pytest.mark.parametrize(
        "page",
        [
            pytest.param(
                name,
                marks=[pytest.mark.slow, pytest.mark.network] * (name in NETWORK_PAGES)
                + [pytest.mark.isolated] * (name in ISOLATED_PAGES),
            )
            for name, blocks in PAGES.items()
            if any(block.language in languages for block in blocks)
        ],
    )


# Code that a block of text would hide from these tests.
CODE = re.compile(
    r"\s*(\$ \S|pip install |make [a-z]+(\s+#|$)|torchrun |python \S+\.py|import \w+$"
    r"|fullattn [a-z]+ (-|\S+[./:])|from [\w.]+ import )"
)


def faults(block: Block) -> list[str]:
    """List why some of a block would not run."""
    prompts = re.search(r"^\s*>>> ", block.text, re.MULTILINE) is not None
    found = [] if block.language in LANGUAGES else [f"language {block.language!r}"]
    found += ["a prompt outside of pycon, or pycon without"] * (
        prompts != (block.language == "pycon")
    )
    found += ["skipped"] * (re.search(r"#\s*doctest:.*\+SKIP", block.text) is not None)
    if block.language == "text":
        found += [line for line in block.text.splitlines() if CODE.match(line)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_is_text(page: str) -> None:
    assert {block.line: why for block in PAGES[page] if (why := faults(block))} == {}
    visible = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    fences = re.findall(r"^[ \t>*+-]*(?:\d+[.)] +)?`{3,}(?=[^`\n]*$)", visible, re.MULTILINE)
    assert len(fences) == 2 * len(PAGES[page])


@with_blocks("pycon")
def test_pages_of_pycon_are_doctests(page: str, pytestconfig: pytest.Config) -> None:
    assert "*.md" in pytestconfig.getoption("doctestglob")
    places = [ROOT / each for each in pytestconfig.getini("testpaths")]
    assert any(place in (ROOT / page, *(ROOT / page).parents) for place in places)


@with_blocks("python")
def test_python_runs(page: str) -> None:
    with library_of(page):
        run_python(page, PAGES[page])


def every_command() -> Iterator[Any]:
    for blocks in PAGES.values():
        for block in blocks:
            for place, command in commands_of(block) if block.language == "sh" else ():
                slow = re.search(r"^(fullattn|torchrun)\b.*\b(train|swap)\b", command)
                yield pytest.param(
                    command,
                    id=f"{place}-{' '.join(command.split()[:2])}",
                    marks=[pytest.mark.slow] * (slow is not None),
                )


@pytest.mark.parametrize("command", [*every_command()])
def test_commands_run(command: str) -> None:
    run_command(command)


def test_what_is_replaced_is_still_there() -> None:
    for page, entries in INSTEAD.items():
        for text in entries:
            assert any(text in block.text for block in PAGES[page]), (page, text)
    for name, options in SMALLER.items():
        for option in options:
            assert option.removeprefix("+") in help_of(name), (name, option)


def help_of(name: str) -> str:
    """Return what `fullattn NAME --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        parser_of(name).parse_args([name, "--help"])
    return said.getvalue()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_help_are_accepted(name: str) -> None:
    _, _, rest = help_of(name).partition("examples:\n")
    examples = [text for _, text in commands_of(Block(name, 0, "sh", rest.partition("\n\n")[0]))]
    assert any(f"fullattn {name}" in text for text in examples)
    for text in examples:
        words = shlex.split(text[text.index("fullattn ") :])[1:]
        parser_of(*words[:1]).parse_args(words)


# That a fault is noticed


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["```", "code", "```"], "language ''"),
        (["~~~bash", "ls", "~~~"], "language 'bash'"),
        (["- entry", "", "    ```js", "    code", "    ```"], "language 'js'"),
        (["> ```", "> code", "> ```"], "language ''"),
        (["```pycon", "1 + 1", "```"], "prompt"),
        (["```python", ">>> 1 + 1", "```"], "prompt"),
        (["```pycon", ">>> f()  # doctest: +SKIP", "```"], "skipped"),
        (["```text", "fullattn bench --repeats 1", "```"], "fullattn bench"),
        (["```text", "import torch", "```"], "import torch"),
    ],
)
def test_a_block_that_would_not_run_is_found(lines: list[str], fault: str) -> None:
    (block,) = blocks_of("page.md", "\n".join(["# A page", "", *lines, ""]))
    (found,) = faults(block)
    assert fault in found


def test_commands_are_divided_and_without_comments() -> None:
    text = "# first\ncd x && A=1 make \\\n  bench  # it's here\nfullattn predict 'a #b' c#d\n"
    assert [*commands_of(Block("page.md", 3, "sh", text))] == [
        ("page.md:5", "cd x"),
        ("page.md:5", "A=1 make bench"),
        ("page.md:7", "fullattn predict 'a #b' c#d"),
    ]


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf out",
        "fullattn info > file",
        "fullattn info --layers fully",
        "fullattn info --layer some",
        "FULLATTN_BACKEND=none fullattn info",
        "fullattn bench --module gone.py:Block",
        "fullattn bench --shapes 512x97",
        "fullattn train camwid --data data",
        "fullattn maps street.jpg --backbone resnet5",
        "torchrun --gpus 8 -m fullattn train camvid --data data",
        "torchrun train.py",
        "make guides",
        "make bench SPEED=11",
        "pip install '.[everything]'",
        "pip install requests",
        "pip uninstall fullattn",
        "python benchmarks/gone.py",
        "python benchmarks/camvid.py compare --seed-s 1",
        "git push",
    ],
)
def test_a_command_that_is_wrong_fails(command: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        run_command(command)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\ny = z\n```\n", NameError),
        ("```pycon\n>>> x = {}\n\n```\n```python\nx[2]\n```\n", KeyError),
        (
            "```pycon\n>>> 1\nTraceback (most recent call last):\nError: no\n```\n```python\n```\n",
            pytest.fail.Exception,
        ),
    ],
)
def test_python_that_is_wrong_fails(text: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        run_python("page.md", blocks_of("page.md", text))
