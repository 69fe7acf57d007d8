"""Every block of code in README.md and below docs/ and benchmarks/results/ runs.

`>>>` lines run as doctests, which needs no help from here. This file runs the rest: a page's blocks
of Python in order and in one namespace, together with its `>>>` lines, and the commands of a shell
one by one, each in a folder that holds what it names, and made small by the tables below. A command
that no entry of `PROGRAMS` knows fails, so that nothing is left out silently.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fullattn._cli import arguments as command_line
from fullattn._cli.errors import UsageError
from fullattn._cli.main import COMMANDS, main, parser_of
from fullattn._cli.shapes import parse_shape
from helpers import ROOT, code_blocks, tiny_data
from helpers.code_blocks import Block, Command, Page, commands
from helpers.networks import NEEDS, load, missing
from helpers.tiny_training import processes

PATHS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").rglob("README.md")),
]
PAGES = [code_blocks.read(str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in PATHS]
SLOW_PAGES = ("docs/guides/export.md",)
SLOW_COMMANDS = {"train", "swap"}


# What is run otherwise than it stands there, and why. Every entry must be of use.


@dataclass(frozen=True)
class Instead:
    """A page's text and what runs in its place."""

    page: str
    text: str
    runs: str
    reason: str


INSTEAD = (
    Instead(
        "docs/guides/flanet.md",
        "fullattn.models.FLANet(19)",
        "fullattn.models.FLANet(19, 'test_resnet', channels=8, out_channels=8)",
        "a ResNet-101 and a file of its weights take seconds, and test_flanet has them",
    ),
    Instead(
        "docs/guides/export.md",
        'package_path="layer.pt2")',
        'package_path="layer.pt2", inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"'
        ', "cpp.simdlen": 1, "cpp.vec_isa_ok": True})',
        "compiling takes half a minute with optimisation and a try of every instruction set",
    ),
    Instead(
        "docs/guides/export.md",
        '>>> compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")\n'
        ">>> torch.allclose(compiled(example), model(example), atol=1e-5)\n",
        "",
        "takes seconds, nothing below builds on it, and as a doctest it runs",
    ),
    Instead(
        "docs/guides/export.md",
        ">>> torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=free, verbose=False)"
        ".save(file)\n"
        ">>> session = onnxruntime.InferenceSession(file.getvalue())\n"
        ">>> (result,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})\n"
        ">>> torch.allclose(torch.from_numpy(result), model(image), atol=1e-4)\n",
        "",
        "takes seconds, nothing below builds on it, and as a doctest it runs",
    ),
)


@dataclass(frozen=True)
class Smaller:
    """An option of a command that makes it small enough to run here.

    Attributes:
        option: its name.
        values: given to it.
        reason: why.
        always: also where the command does not have it; otherwise in place of what it has.
    """

    option: str
    values: tuple[str, ...]
    reason: str
    always: bool = False


_CPU = Smaller("--device", ("cpu",), "there may be no GPU")
_TIMES = (
    Smaller("--repeats", ("1",), "figures are not looked at", always=True),
    Smaller("--no-memory", (), "takes a process for each figure", always=True),
)
SMALLER: dict[str, tuple[Smaller, ...]] = {
    "bench": (
        *_TIMES,
        _CPU,
        Smaller("--shapes", ("4x6x8",), "maps of real sizes take minutes", always=True),
    ),
    "swap": (
        *_TIMES,
        _CPU,
        Smaller("--shape", ("2x3x64x64",), "a ResNet-50 on real images takes seconds", always=True),
    ),
    "train": (
        Smaller("--precision", ("32-true",), "half precision needs a GPU"),
        Smaller("--strategy", ("auto",), "one process here"),
        Smaller("--devices", ("1",), "one process here"),
        Smaller("--nodes", ("1",), "one machine here"),
        Smaller("--accumulate", ("2",), "a batch of 2 has two parts"),
        Smaller(
            "--set",
            (
                *("training.steps=2", "training.batch_size=2", "training.warmup_steps=0"),
                *("training.sync_batchnorm=false", "training.precision=32-true"),
                *("training.strategy=auto", "training.average_decay=null"),
                *("data.crop=[24,32]", "data.workers=0"),
                *("model.backbone=test_resnet", "model.backbone_options={}"),
                *("model.backbone_weights=null", "model.pretrained=false"),
                *("model.channels=8", "model.out_channels=8", "model.auxiliary_channels=8"),
            ),
            "a run of a second on one CPU, without a download",
            always=True,
        ),
    ),
    "evaluate": (
        _CPU,
        Smaller("--window", ("48x64",), "of the size of the tiny images"),
        Smaller("--stride", ("24x32",), "of the size of the tiny images"),
        Smaller("--workers", ("0",), "no processes for six images"),
    ),
    "predict": (_CPU, Smaller("--window", ("240x320",), "two windows of a photograph are enough")),
    "maps": (
        Smaller("--backbone", ("test_resnet",), "small, and its weights are not downloaded"),
        Smaller("--weights", ("backbone.pth",), "those of the small backbone"),
    ),
    "info": (_CPU,),
}

# Files that commands and code name, with the tiny ones that stand for them.
MODULES = {
    "my_block.py": (
        "from torch import nn\n\n\n"
        "class MyBlock(nn.Module):\n"
        "    def __init__(self, channels):\n"
        "        super().__init__()\n"
        "        self.convolution = nn.Conv2d(channels, channels, 1)\n\n"
        "    def forward(self, x):\n"
        "        return self.convolution(x)\n"
    ),
    "my_net.py": (
        "from torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.backbone = nn.Sequential()\n"
        "        self.backbone.layer4 = nn.Conv2d(3, 8, 3, padding=1)\n\n"
        "    def forward(self, x):\n"
        "        return self.backbone(x)\n"
    ),
}
DATA_SETS = {
    "camvid": tiny_data.camvid,
    "cityscapes": tiny_data.cityscapes,
    "ade20k": tiny_data.ade20k,
    "voc": tiny_data.voc,
    "folder": tiny_data.folder,
}


def fail(where: object, why: str) -> Any:
    pytest.fail(f"{where}: {why}", pytrace=False)


# What pages and commands name.


def photograph(path: Path) -> None:
    random = np.random.default_rng(0)
    tiny_data.save(path, tiny_data.picture((480, 640), list(range(9)), random)[0])


def checkpoint(path: Path, data: str = "camvid") -> None:
    """What `fullattn train` leaves, of the smallest network with the classes of a data set."""
    load("timm")
    from fullattn.segmentation.data import classes
    from fullattn.segmentation.models import FLANet
    from fullattn.segmentation.models.files import Description, describe

    known = classes.numbered(4) if data == "folder" else classes.known(data)
    torch.manual_seed(0)
    network = FLANet(len(known.names), "test_resnet", channels=8, out_channels=8, auxiliary=False)
    description = Description(
        model=describe(network),
        dataset=data,
        classes=known.names,
        palette=known.palette,
        groups=known.groups,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    weights = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "fullattn": description.plain()}, path)


def public_weights(path: Path) -> None:
    """The weights of a small FLANet with the names of the official code."""
    load("timm")
    from fullattn import checkpoints
    from fullattn.segmentation.models import FLANet

    network = FLANet(19, "test_resnet", channels=8, out_channels=8)
    torch.save(checkpoints.convert(network.state_dict(), "flanet", reverse=True), path)


def backbone_weights(path: Path) -> None:
    timm = load("timm")
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), path)


def old_report(path: Path) -> None:
    arguments = ["--shapes", "4x6x8", "--repeats", "1", "--no-memory"]
    with tempfile.TemporaryDirectory() as folder:
        assert main(["bench", *arguments, "--output", folder]) == 0
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(folder) / "bench.json", path)


def provide(name: str, data: str = "camvid") -> None:
    """Put the file or the files of that name into the current folder, if it is one of ours."""
    path = Path(name)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return
    if (ROOT / path).is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, path)
    elif path.suffix == ".jpg":
        for each in ("a", "b") if "*" in name else ("",):
            photograph(Path(name.replace("*", each)))
    elif path.suffix == ".ckpt":
        checkpoint(path, data)
    elif path.name == "flanet_cityscapes.pth":
        public_weights(path)
    elif name in MODULES:
        path.write_text(MODULES[name])


# Python, with the `>>>` lines of the page.


def docs_conftest() -> ModuleType:
    """docs/conftest.py, which says what library each page is about."""
    spec = importlib.util.spec_from_file_location("docs_conftest", ROOT / "docs" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def library_of(page: str) -> Iterator[None]:
    """As in docs/conftest.py: a page about a library that is not there is skipped."""
    stem = Path(page).stem
    name = docs_conftest().ABOUT.get(stem, stem)
    with warnings.catch_warnings():
        if name in NEEDS:
            load(name)
            warnings.simplefilter("ignore")  # theirs
        yield


def instead(page: str, text: str) -> str:
    for entry in INSTEAD:
        if entry.page == page:
            text = text.replace(entry.text, entry.runs)
    return text


def run_python(page: Page) -> None:
    """Run a page's blocks of python, and of pycon before them, in the current folder."""
    blocks = page.of("python", "pycon")
    while blocks and blocks[-1].language == "pycon":
        blocks.pop()
    for block in blocks:
        for name in re.findall(r"""["']([\w./-]+\.\w+)["']""", block.text):
            provide(name)
        for name in re.findall(r"""["'](data/(\w+))["']""", block.text):
            DATA_SETS[name[1]](Path(name[0]))
    names: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for block in blocks:
        text = instead(page.name, block.text)
        if block.language == "python":
            _execute(text, "exec", names, page.name, block.line)
        else:
            for example in doctest.DocTestParser().get_examples(text):
                with contextlib.redirect_stdout(io.StringIO()):
                    line = block.line + example.lineno
                    expected = example.exc_msg is not None
                    _execute(example.source, "single", names, page.name, line, expected)


def _execute(
    text: str, mode: str, names: dict[str, Any], page: str, line: int, expected: bool = False
) -> None:
    """Run code that begins behind a line of a page; `expected`: it is to raise."""
    try:
        code = compile("\n" * line + text, page, mode, dont_inherit=True)
        exec(code, names)
    except Exception as error:
        if expected:
            return
        frames = [frame for frame in _frames(error) if frame[0] == page]
        number = frames[-1][1] if frames else getattr(error, "lineno", None) or line
        fail(f"{page}:{number}", f"{type(error).__name__}: {error}")
    if expected:
        fail(f"{page}:{line + 1}", "raised nothing, and is to")


def _frames(error: BaseException) -> Iterator[tuple[str, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


# Commands. Each program is given the command and its arguments, in a folder of its own.


def run_command(command: Command) -> None:
    """Run a command in the current folder, or check as much of it as can be."""
    try:
        environment, words = command.words()
    except ValueError as error:
        fail(command, str(error))
    if not words or words[0] not in PROGRAMS:
        fail(command, f"an unknown command; known are {', '.join(PROGRAMS)}")
    PROGRAMS[words[0]](command, words[1:], environment)


def run_fullattn(command: Command, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Run it small. As it stands there it must be what the parser accepts."""
    args = accepted(command, arguments)
    if args is None:  # --help or --version
        return
    try:
        for shape in command_line.words([*(_get(args, "shapes") or ()), _get(args, "shape") or ""]):
            parse_shape(shape)
        if _get(args, "device"):
            torch.device(args.device)
        smaller = made_small(args.command, _prepared(args, arguments))
    except (UsageError, RuntimeError, ValueError) as error:
        fail(command, str(error))
    if environment:
        status, said = _in_a_process(smaller, environment)
    elif args.command == "train":
        status, said = _forked(smaller)
    else:
        status, said = _here(smaller)
    if status != 0:
        run = " ".join(smaller)
        fail(command, f"exit status {status} of fullattn {run}\n{said}")


def _get(args: argparse.Namespace, name: str) -> Any:
    return getattr(args, name, None)


def accepted(where: object, arguments: list[str]) -> argparse.Namespace | None:
    """What the command line's parser makes of arguments; None where it prints what is asked."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parser_of(*arguments[:1]).parse_args(arguments)
    except SystemExit as end:
        if end.code:
            fail(where, said.getvalue())
    return None


def _below(path: object) -> str:
    """A path with nothing that leads out of the current folder."""
    return re.sub(r"^(?:~?/|(?:\.\./)+)", "", str(path))


def _prepared(args: argparse.Namespace, arguments: list[str]) -> list[str]:
    """The arguments with every path below the current folder, where the files now are."""
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
        DATA_SETS[data](Path(_below(args.data)))
    if args.command == "evaluate":
        data, root = args.data
        DATA_SETS[data](Path(_below(root)))
    if _get(args, "compare"):
        old_report(Path(_below(args.compare)))
    if _get(args, "backbone"):
        backbone_weights(Path("backbone.pth"))
        if not load("timm").is_model(args.backbone):
            raise UsageError(f"timm has no {args.backbone}")
    for word in [*(_get(args, "modules") or ()), *filter(None, [_get(args, "model")])]:
        package = re.split("[.:]", word)[0]
        if package in NEEDS:
            load(package)
    words = []
    for word in map(_below, arguments):
        provide(word.rpartition(":")[0] or word, data)
        found = sorted(glob(word)) if "*" in word else []
        words += found or [word]
    return words


def made_small(name: str, arguments: list[str]) -> list[str]:
    """The arguments with what `SMALLER` has for this command."""
    words = list(arguments)
    for entry in SMALLER.get(name, ()):
        options = [i for i, word in enumerate(words) if word.split("=")[0] == entry.option]
        if entry.option == "--set":
            words += [entry.option, *entry.values]
        elif options:
            end = options[0] + 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            words[options[0] : end] = [entry.option, *entry.values]
        elif entry.always:
            words += [entry.option, *entry.values]
    if name == "maps" and "--backbone" in words and "--weights" not in words:
        words += ["--weights", "backbone.pth"]
    return words


def _here(arguments: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(arguments), said.getvalue()


def _forked(arguments: list[str]) -> tuple[int, str]:
    """Lightning leaves too much behind in a process."""
    said = Path("said")
    said.touch()
    child = processes().Process(target=code_blocks.call, args=(arguments, Path.cwd(), said))
    child.start()
    child.join(120)
    child.kill()
    child.join()
    return child.exitcode, said.read_text()


def _in_a_process(arguments: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """FULLATTN_BACKEND and others are read when the package is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "fullattn", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def run_torchrun(command: Command, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Its own parser accepts its options; what it starts on every machine runs once."""
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = get_args_parser().parse_args(arguments)
    except SystemExit:
        fail(command, said.getvalue())
    if not args.module or args.training_script != "fullattn":
        fail(command, "expected torchrun ... -m fullattn ...")
    run_fullattn(command, args.training_script_args, environment)


def check_make(command: Command, arguments: list[str], environment: Mapping[str, str]) -> None:
    """The targets are there, and the variables are looked at; nothing is made."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = [word for word in arguments if "=" not in word]
    for word in [*arguments, *(f"{name}=" for name in environment)]:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"\$\({name}\)|\b{name}=|\${{{name}}}", makefile):
            if word in arguments:
                fail(command, f"the Makefile does nothing with {name}")
        elif not equals and not re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE):
            fail(command, f"the Makefile has no target {name!r}")
    if not shutil.which("make"):
        pytest.skip(f"make is not installed; its targets {', '.join(targets)} are there")
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        fail(command, done.stderr)


def check_pip(command: Command, arguments: list[str], environment: Mapping[str, str]) -> None:
    """What is installed is this package with extras that it has, or what it depends on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = project["dependencies"] + [each for several in extras.values() for each in several]
    packages = {re.split(r"[^\w.-]", each)[0].lower() for each in known}
    verb, *words = arguments or [""]
    if verb != "install":
        fail(command, f"pip {verb} is not known here")
    while words:
        word = words.pop(0)
        if word in ("-e", "--editable", "-U", "--upgrade", "-q", "--quiet"):
            continue
        if word in ("-c", "-r"):
            if not (ROOT / words.pop(0)).is_file():
                fail(command, f"no file for {word}")
            continue
        if word == "--index-url":
            words.pop(0)
            continue
        found = re.fullmatch(r"(\.|[\w.-]+)(?:\[([\w,-]+)\])?(?:[=<>~!]=?[\w.*]+)?", word)
        if found is None:
            fail(command, f"{word} is not known here")
        if found[1] not in (".", "fullattn") and found[1].lower() not in packages:
            fail(command, f"{found[1]} is nothing that this package depends on")
        for extra in found[2].split(",") if found[2] and found[1] in (".", "fullattn") else ():
            if extra not in extras:
                fail(command, f"there is no extra {extra!r}; there are {', '.join(extras)}")


class _Accepted(BaseException):
    """A script's parser has taken its arguments."""


def check_script(command: Command, arguments: list[str], environment: Mapping[str, str]) -> None:
    """The file is there and its parser takes the arguments; nothing behind that runs."""
    if arguments[:2] == ["-m", "fullattn"]:
        run_fullattn(command, arguments[2:], environment)
        return
    if arguments[:2] == ["-m", "pip"]:
        check_pip(command, arguments[2:], environment)
        return
    script = ROOT / (arguments or ["-"])[0]
    if not script.is_file():
        fail(command, f"there is no file {(arguments or ['-'])[0]}")
    text = script.read_text("utf-8")
    if not (re.search(r"^def main\(\)", text, re.MULTILINE) and "parse_args()" in text):
        fail(command, f"{script.name} has no main() with a parser, so nothing checks its arguments")
    said, real = io.StringIO(), argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *given: Any, **options: Any) -> Any:
        real(parser, *given, **options)
        raise _Accepted

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(sys, "argv", [str(script)])  # scripts may look at it when imported
        spec = importlib.util.spec_from_file_location(f"_script_{script.stem}", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, module.__name__, module)  # for dataclasses
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, at import
            spec.loader.exec_module(module)
        patch.setattr(sys, "argv", [str(script), *arguments[1:]])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        try:
            module.main()
        except _Accepted:
            return
        except SystemExit as end:
            if end.code == 0:  # --help
                return
    fail(command, said.getvalue() or "its parser was not asked")


def check_git(command: Command, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Nothing is fetched here."""
    if arguments[:1] != ["clone"] or len(arguments) not in (2, 3):
        fail(command, f"git {' '.join(arguments[:1])} is not known here")


def check_cd(command: Command, arguments: list[str], environment: Mapping[str, str]) -> None:
    """The folder is the checkout, whatever it is called."""
    if len(arguments) != 1:
        fail(command, "expected one folder")


PROGRAMS: dict[str, Callable[[Command, list[str], Mapping[str, str]], None]] = {
    "fullattn": run_fullattn,
    "torchrun": run_torchrun,
    "make": check_make,
    "pip": check_pip,
    "python": check_script,
    "git": check_git,
    "cd": check_cd,
}


# The pages.


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # `fullattn` looks for modules where it runs
    monkeypatch.setenv("MPLBACKEND", "agg")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _marks(slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if slow else []


def every_command() -> Iterator[Any]:
    for page in PAGES:
        for block in page.of("sh"):
            for each in commands(
                Block(page.name, block.line, "sh", instead(page.name, block.text))
            ):
                words = each.text.split()
                name = f"{each.page}:{each.line}-{' '.join(words[:2])}"
                slow = SLOW_COMMANDS.intersection(words[1:]) and words[0] in (
                    "fullattn",
                    "torchrun",
                )
                yield pytest.param(each, id=name, marks=_marks(bool(slow)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_language_that_is_run(page: Page) -> None:
    if page.faults:
        pytest.fail("\n".join(page.faults), pytrace=False)


@pytest.mark.parametrize("page", [p for p in PAGES if p.of("pycon")], ids=lambda page: page.name)
def test_pages_of_pycon_are_doctests(page: Page, pytestconfig: pytest.Config) -> None:
    assert "*.md" in pytestconfig.getoption("doctestglob")
    places = [ROOT / each for each in pytestconfig.getini("testpaths")]
    path = ROOT / page.name
    assert any(place in (path, *path.parents) for place in places), (
        f"{page.name}:{page.of('pycon')[0].line}: nothing runs >>> here, outside of testpaths"
    )
    examples = doctest.DocTestParser().get_examples(path.read_text("utf-8"))
    found = {example.lineno + 1 for example in examples}
    for block in page.of("pycon"):
        lines = range(block.line + 1, block.line + 1 + block.text.count("\n"))
        assert found.intersection(lines), f"{page.name}:{block.line}: doctest finds nothing here"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=_marks(page.name in SLOW_PAGES))
        for page in PAGES
        if page.of("python")
    ],
)
def test_python_runs(page: Page) -> None:
    with library_of(page.name):
        run_python(page)


@pytest.mark.parametrize("command", [*every_command()])
def test_commands_run(command: Command) -> None:
    run_command(command)


@pytest.mark.parametrize("entry", INSTEAD, ids=lambda entry: f"{entry.page}-{entry.text[:40]!r}")
def test_what_is_replaced_is_still_there(entry: Instead) -> None:
    blocks = [block for page in PAGES if page.name == entry.page for block in page.blocks]
    assert any(entry.text in block.text for block in blocks), f"{entry.page} has no {entry.text!r}"


# The examples of --help.


def subparsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def examples_of(name: str, parser: argparse.ArgumentParser) -> list[Command]:
    """The commands below "examples:", which an empty line ends."""
    _, _, rest = (parser.epilog or "").partition("examples:\n")
    text = re.sub(r"(?m)^ {2}", "", rest.partition("\n\n")[0])
    return list(commands(Block(f"fullattn {name} --help", 0, "sh", f"{text}\n")))


HELP = [(name, parser) for name, parser in subparsers(parser_of(*COMMANDS)) if parser.epilog]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=f"{name}-{command.line}")
        for name, parser in HELP
        for command in examples_of(name, parser)
    ],
)
def test_the_examples_of_help_are_accepted(command: Command) -> None:
    _, words = command.words()
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    assert words[0] == "fullattn"
    args = accepted(command, words[1:])
    assert args is not None
    for shape in command_line.words(_get(args, "shapes") or ()):
        parse_shape(shape)


@pytest.mark.parametrize(("name", "parser"), HELP, ids=[name for name, _ in HELP])
def test_help_has_an_example_of_its_command(name: str, parser: argparse.ArgumentParser) -> None:
    assert any(f"fullattn {name}" in command.text for command in examples_of(name, parser))


def test_what_makes_commands_small_is_among_their_options() -> None:
    parsers = dict(subparsers(parser_of(*COMMANDS)))
    for name, entries in SMALLER.items():
        for entry in entries:
            assert entry.option in parsers[name]._option_string_actions, (name, entry.option)


# That a fault is noticed, with its page and line.


def page_of(*lines: str) -> Page:
    return code_blocks.read("page.md", "\n".join(["# A page", "", *lines, ""]))


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["```", "code", "```"], "page.md:3: a block of no language"),
        (["text", "", "~~~bash", "ls", "~~~"], "page.md:5: a block of the language 'bash'"),
        (["```{.python}", "1", "```"], "page.md:3: a block of the language '{.python}'"),
        (["- entry", "", "    ```", "    code", "    ```"], "page.md:5: a block of no language"),
        (["1. ```", "   code", "   ```"], "page.md:3: a block of no language"),
        (["!!! note", "", "    ```", "    x", "    ```"], "page.md:5: a block of no language"),
        (['=== "tab"', "", "    ```js", "    ```"], "page.md:5: a block of the language 'js'"),
        (["> ```", "> code", "> ```"], "page.md:3: a block of no language"),
        (["```sh", "make bench"], "page.md:3: a block that does not end"),
        (["  ```sh", "make", "  ```"], "page.md:4: indented less than the fence"),
        (["```pycon", "1 + 1", "```"], "page.md:3: a block of pycon without >>>"),
        (["```python", ">>> 1 + 1", "```"], "page.md:3: a block with >>> is of pycon"),
        (["```pycon", ">>> f()  # doctest: +SKIP", "```"], "page.md:4: +SKIP"),
        (["```text", "fullattn bench --repeats 1", "```"], "page.md:4: code in a block of text"),
        (["```text", "import torch", "```"], "page.md:4: code in a block of text"),
    ],
)
def test_a_fence_that_is_wrong_is_found(lines: list[str], fault: str) -> None:
    (found,) = page_of(*lines).faults
    assert found.startswith(fault)


def test_fences_are_read_with_what_is_around_them() -> None:
    page = page_of(
        *("!!! note", "", "    ```sh", "    make bench \\", "        PYTHON=python3", "    ```"),
        *("````text", "```sh", "inner", "```", "````"),
        *("<!-- generated by a script", "```", "```", "-->", "<!-- generated -->"),
        *("Code ```in a line``` is no block.", "~~~text", "```", "~~~"),
    )
    assert page.faults == ()
    assert [(block.language, block.line) for block in page.blocks] == [
        ("sh", 5),
        ("text", 9),
        ("text", 20),
    ]
    assert page.blocks[0].text == "make bench \\\n    PYTHON=python3\n"
    assert page.blocks[1].text == "```sh\ninner\n```\n"
    (command,) = commands(page.blocks[0])
    assert str(command) == "page.md:6: make bench PYTHON=python3"


def test_commands_are_divided_and_without_comments() -> None:
    lines = ["# first", "cd x && A=1 fullattn info  # it's here", "fullattn predict 'a #b' c#d"]
    found = list(commands(page_of("```sh", *lines, "```").blocks[0]))
    assert [(command.line, command.words()) for command in found] == [
        (5, ({}, ["cd", "x"])),
        (5, ({"A": "1"}, ["fullattn", "info"])),
        (6, ({}, ["fullattn", "predict", "a #b", "c#d"])),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rm -rf out", "an unknown command"),
        ("$ fullattn info", "variables and commands"),
        ("fullattn info > file", "> is not run here"),
        ("fullattn info | head", r"\| is not run here"),
        ("fullattn info --layers fully", "unrecognized arguments: --layers"),
        ("fullattn info --layer some", "exit status 2 of .*\nfullattn: expected layers of"),
        ("FULLATTN_BACKEND=none fullattn info", "exit status 2 of .*\nfullattn: FULLATTN_BACKEND"),
        ("fullattn bench --module gone.py:Block", "expected a file at 'gone.py'"),
        ("fullattn bench --shapes 512x97", "512x97"),
        ("fullattn train camwid --data data", "camwid"),
        ("fullattn train camvid --data data --set training.step=3", "did you mean 'steps'"),
        ("fullattn maps street.jpg --backbone resnet5", "timm has no resnet5"),
        ("fullattn predict street.jpg --output out", "required: --checkpoint"),
        ("torchrun --gpus 8 -m fullattn train camvid --data data", "error: .*"),
        ("torchrun train.py", "expected torchrun ... -m fullattn"),
        ("make guides", "has no target 'guides'"),
        ("make tests", "has no target 'tests'"),  # a folder of that name is there
        ("make bench SPEED=11", "does nothing with SPEED"),
        ("pip install '.[everything]'", "there is no extra 'everything'"),
        ("pip install requests", "requests is nothing that this package depends on"),
        ("pip uninstall fullattn", "pip uninstall is not known"),
        ("python benchmarks/gone.py", "there is no file benchmarks/gone.py"),
        ("python benchmarks/compiled.py --seconds", "expected one argument"),
        ("python benchmarks/camvid.py compare --seed-s 1", "unrecognized arguments"),
        ("git push", "git push is not known"),
    ],
)
def test_a_command_that_is_wrong_fails(text: str, why: str) -> None:
    (command,) = commands(page_of("```sh", text, "```").blocks[0])
    with pytest.raises(pytest.fail.Exception, match=rf"^page.md:4: (?s:.*){why}"):
        run_command(command)


@pytest.mark.parametrize(
    "text",
    [
        "fullattn --version",
        "python -m pip install -e '.[bench,test]' -c constraints.txt",
        "pip install 'fullattn[train]>=0.1' torch",
        "python -m fullattn info --shape 4x5x6",
        "python benchmarks/gpu.py --rehearse --output out",
        "git clone https://example.org/fullattn.git",
        "HYPOTHESIS_PROFILE=deep make test JOBS=1",
    ],
)
def test_a_command_that_is_right_passes(text: str) -> None:
    (command,) = commands(page_of("```sh", text, "```").blocks[0])
    before = dict(os.environ)
    run_command(command)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["```python", "x = 1", "y = z", "```"], "page.md:5: NameError: name 'z'"),
        (["```python", "x = (", "```"], "page.md:4: SyntaxError"),
        (["```pycon", ">>> x = {}", "", "```", "```python", "", "x[2]", "```"], "page.md:9: KeyE"),
        (
            [
                *("```pycon", ">>> 1", "Traceback (most recent call last):", "Error: no", "```"),
                *("```python", "2", "```"),
            ],
            "page.md:4: raised nothing",
        ),
    ],
)
def test_python_that_is_wrong_fails(lines: list[str], why: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=f"^{why}"):
        run_python(page_of(*lines))


def test_the_blocks_of_a_page_share_their_names() -> None:
    page = page_of(
        *("```pycon", ">>> import json", ">>> 1 / 0", "Traceback (most recent call last):"),
        *("ZeroDivisionError: division by zero", "", "```"),
        *("```python", "from pathlib import Path", "def f():", "    return json.dumps(2)", "```"),
        *("- entry", "", "    ```python", "    Path('written').write_text(f())", "    ```"),
    )
    run_python(page)
    assert Path("written").read_text() == "2"
