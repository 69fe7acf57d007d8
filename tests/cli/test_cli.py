from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fullattn
from fullattn._cli.arguments import LAYER_NAMES
from fullattn._cli.main import COMMANDS, main
from fullattn.attention.dispatch import BACKENDS
from fullattn.layers import LAYERS

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from helpers.terminal import WIDTHS  # noqa: E402

# Seconds of processor time, of Python's own start too.
HELP_SECONDS = 0.3

# The smallest run there is: one layer, one shape, one call.
TINY = ["bench", "--layers", "channel", "--backends", "reference", "--shapes", "4x5x6"]
QUICK = [*TINY, "--no-memory", "--repeats", "2", "--threads", "1"]

MODULES = """
from torch import nn

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
    def forward(self, x):
        return self.conv(x)

class Cropping(Block):
    def forward(self, x):
        return x[..., 1:]

class Strings(Block):
    def forward(self, x):
        return "x"

class Picky(Block):
    def __init__(self, channels, more):
        super().__init__(channels)

def function(channels):
    return None

number = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _bench(*arguments: str, folder: str = "out") -> dict[str, Any]:
    """Run quickly, and return the JSON."""
    assert main([*QUICK, "--output", folder, *arguments]) == 0
    (path,) = Path(folder).glob("*.json")
    return json.loads(path.read_text())


def _names(data: dict[str, Any]) -> list[str]:
    return [row["name"] for row in data["rows"]]


# fullattn, and fullattn info


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fullattn {fullattn.__version__}\n"


def test_python_m_fullattn_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fullattn", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fullattn {fullattn.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], *([c, "-h"] for c in COMMANDS)]
)
def test_help_is_quick(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "import fullattn_cli\n"
        f"sys.argv[1:] = {arguments}\n"
        "status = fullattn_cli.main()\n"
        "heavy = {'torch', 'numpy', 'einops', 'rich', 'yaml'} & set(sys.modules)\n"
        "print(time.process_time(), *heavy, file=sys.stderr)\n"
        "sys.exit(status)"
    )
    # As an installed package has them, the first run writes the files of bytecode.
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    times: list[float] = []
    while len(times) < 5 and min(times, default=1.0) > HELP_SECONDS:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | bytecode,
        )
        seconds, *heavy = done.stderr.split()
        assert heavy == []
        times.append(float(seconds))
    assert min(times) <= HELP_SECONDS, times


def test_a_command_runs_from_the_entry_point() -> None:
    program = (
        "import sys, fullattn_cli\n"
        "sys.argv[1:] = ['info', '--shape', '4x5x6']\n"
        "status = fullattn_cli.main()\n"
        "import fullattn\n"
        "assert callable(fullattn.swap) and fullattn.FullyAttentional(4)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SpatialNonLocal at 4x5x6" in done.stdout


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_says_what_is_done_before_pytorch_is_imported(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    said: list[str] = []
    assert main(["maps", "gone.png"], load=lambda: said.append(error.getvalue())) == 2
    sentence = error.getvalue()
    if terminal:
        assert said == ["fullattn maps: importing PyTorch ..."]
        _, _, sentence = sentence.rpartition("\r\x1b[K")  # what was said is erased
    else:
        assert said == [""]
    assert sentence.startswith("fullattn: ")
    assert sentence.count("\n") == 1


def test_the_names_of_layers_in_help_are_those_of_the_registry() -> None:
    assert [name for name, each in LAYERS.items() if each.__module__.startswith("fullattn.")] == [
        *LAYER_NAMES
    ]


@pytest.mark.parametrize("command", [None, *COMMANDS])
@pytest.mark.parametrize("width", WIDTHS)
def test_help_fits_the_terminal(
    command: str | None, width: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([command, "--help"] if command else []) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: fullattn")
    assert max(map(len, text.splitlines())) <= width, text


@pytest.mark.parametrize("command", ["bench", "info"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"examples:\n  fullattn {command}" in capsys.readouterr().out


def test_info_says_of_every_backend_whether_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["info", "--layer", "fully", "--shape", "64x32x32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    start = lines.index("FullyAttentional at 64x32x32, float32, cpu:")
    *rows, empty, verdict = lines[start + 1 :]
    said = dict(line.strip().split(maxsplit=1) for line in rows)
    assert list(said) == [backend.name for backend in BACKENDS]
    assert sum(sentence.startswith("runs: ") for sentence in said.values()) == 1
    assert said["linear"].startswith("cannot run: ")
    assert empty == ""
    runs = next(name for name, sentence in said.items() if sentence.startswith("runs: "))
    assert verdict == f"At 64x32x32, float32, cpu: FullyAttentional on {runs}."


@pytest.mark.parametrize("width", WIDTHS)
def test_info_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    words: list[list[str]] = []
    for columns in (width, 10**4):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["info"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= columns
        words.append(text.split())
    assert words[0] == words[1]
    assert "1 thread" in text
    assert "1 threads" not in text


def test_info_follows_shape_and_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--shape", "small", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    for title in ("FullyAttentional", "ChannelNonLocal", "SpatialNonLocal"):
        assert f"{title} at 64x16x16, bfloat16, cpu:" in out


def test_info_works_without_the_extra() -> None:
    # As in an installation of torch and einops alone.
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'PIL'): sys.modules[name] = None\n"
        "from fullattn._cli.main import main\n"
        "sys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SpatialNonLocal at 512x97x97" in done.stdout


# fullattn bench


def test_bench_writes_tables_json_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--output", "a/b"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "By formula",
        "Measured",
        "official implementation",
        "ChannelNonLocal reference",
    ):
        assert expected in out
    assert "\na/b/bench.json\na/b/bench.png\n\nChannelNonLocal, inference at 4x5x6: " in out
    assert "\nChannelNonLocal, training at 4x5x6: " in out
    assert sorted(path.name for path in Path("a/b").iterdir()) == ["bench.json", "bench.png"]
    with Image.open("a/b/bench.png") as image:
        assert image.format == "PNG"
    data = json.loads(Path("a/b/bench.json").read_text())
    assert _names(data) == ["official", "channel:reference"]
    for row in data["rows"]:
        assert len(row["inference"]["times_ms"]) == len(row["training"]["times_ms"]) == 2


def test_shapes_layers_and_backends() -> None:
    data = _bench(
        "--shapes",
        "4x5x6",
        "2x4x6x5,small",
        "--layers",
        "fully,channel",
        "--backends",
        "sdpa",
        "reference",
    )
    assert [row["shape"] for row in data["rows"][::5]] == [
        [1, 4, 5, 6],
        [2, 4, 6, 5],
        [1, 64, 16, 16],
    ]
    assert _names(data)[:5] == [
        "official",
        "fully:sdpa",
        "fully:reference",
        "channel:sdpa",
        "channel:reference",
    ]


@pytest.mark.parametrize(
    ("mode", "modes"),
    [("inference", {"inference"}), ("training", {"training"}), ("both", {"inference", "training"})],
)
def test_modes(mode: str, modes: set[str]) -> None:
    for row in _bench("--mode", mode)["rows"]:
        assert {"inference", "training"} & set(row) == modes


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--memory-format", "channels_last"], "memory_format", "channels_last"),
        (["--device", "cpu"], "device", "cpu"),
        (["--seed", "7"], "seed", 7),
        (["--threads", "2"], "threads", 2),
        (["--project"], "project", True),
    ],
)
def test_conditions_are_taken_and_written_down(
    arguments: list[str], name: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _bench("--mode", "inference", *arguments)
    assert data["conditions"][name] == value
    assert all(row["inference"]["failure"] is None for row in data["rows"])
    projection = "with" if name == "project" else "without"
    said = " ".join(capsys.readouterr().out.split())
    assert f"official implementation {projection} their 3x3 projection" in said


def test_projection_adds_its_parameters() -> None:
    parameters = [
        _bench(*project)["rows"][0]["formula"]["parameters"] for project in ([], ["--project"])
    ]
    assert parameters[1] - parameters[0] == 4 * 4 * 9 + 2 * 4


def test_repeats_seconds_and_limit() -> None:
    assert len(_bench("--repeats", "4")["rows"][0]["inference"]["times_ms"]) == 4
    assert main([*TINY, "--no-memory", "--seconds", "1e-9", "--output", "short"]) == 0
    data = json.loads(Path("short/bench.json").read_text())
    assert len(data["rows"][0]["inference"]["times_ms"]) == 3
    data = _bench("--limit", "1e-9")
    assert data["rows"][0]["inference"]["failure"]["kind"] == "too slow"
    assert main([*TINY, "--no-memory", "--budget", "1e-9", "--output", "hasty"]) == 0
    data = json.loads(Path("hasty/bench.json").read_text())
    assert len(data["rows"][0]["inference"]["times_ms"]) == 1


def test_peak_memory_is_measured_in_both_modes() -> None:
    assert main([*TINY, "--shapes", "16x40x40", "--repeats", "1", "--threads", "1"]) == 0
    rows = json.loads(Path("out/bench/bench.json").read_text())["rows"]
    for row in rows:
        # The result alone is 100 KiB.
        assert row["inference"]["peak_bytes"] > 16 * 40 * 40 * 4
        assert row["training"]["peak_bytes"] > 16 * 40 * 40 * 4


def test_baseline() -> None:
    data = _bench("--baseline", "channel:reference")
    assert data["rows"][1]["training"]["time_over_baseline"] == 1.0
    assert data["rows"][0]["training"]["time_over_baseline"] != 1.0


@pytest.mark.parametrize("axis", ["resolution", "channels"])
def test_sweeps_have_a_picture_of_their_own(axis: str) -> None:
    data = _bench("--sweep", axis, "--shapes", "16x16x24", folder=axis)
    assert data["sweep"] == axis
    assert len({tuple(row["shape"]) for row in data["rows"]}) == 5
    assert data["rows"][-1]["shape"] == [1, 16, 16, 24]
    assert sorted(path.name for path in Path(axis).iterdir()) == ["sweep.json", "sweep.png"]


def test_implementations_from_a_file_and_from_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(MODULES)
    Path("yours.py").write_text(MODULES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    data = _bench(
        "--module", "mine.py:Block", "--module", "yours:Block", "--baseline", "mine:Block"
    )
    assert _names(data)[2:] == ["mine:Block", "yours:Block"]
    row = data["rows"][2]
    assert row["formula"]["parameters"] == 4 * 4 + 4
    assert row["formula"]["flops"] is None
    assert row["formula"]["counted_flops"] == 2 * 4 * 4 * 30
    assert row["inference"]["time_over_baseline"] == 1.0


def test_photographs_as_input(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (40, 30), 90).save("photo.png")
    data = _bench("--image", "photo.png")
    assert data["conditions"]["input"].startswith("image photo.png")
    assert "image photo.png through a random stem" in capsys.readouterr().out


def test_comparison_names_what_became_slower(capsys: pytest.CaptureFixture[str]) -> None:
    _bench("--repeats", "5", folder="before")
    path = Path("before/bench.json")
    old = json.loads(path.read_text())
    for mode in ("inference", "training"):  # as if it had taken a thousandth of the time
        old["rows"][1][mode]["times_ms"] = [
            time / 1000 for time in old["rows"][1][mode]["times_ms"]
        ]
    path.write_text(json.dumps(old))
    capsys.readouterr()
    _bench("--compare", str(path), folder="now")
    out = capsys.readouterr().out
    assert "2 of 2 times slower beyond the noise" in out
    assert [line.split()[-1] for line in out.splitlines() if "channel:reference" in line] == [
        "slower",
        "slower",
    ]


# Bad input


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on standard error, after checking that nothing else came out of it."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert [
        path for path in sorted(Path.cwd().rglob("*")) if "__pycache__" not in str(path)
    ] == before
    return captured.err


@pytest.mark.parametrize("arguments", [["info"], [*QUICK, "--backends", "auto"]])
def test_an_unknown_backend_in_the_environment_is_one_sentence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fullattn.attention.dispatch._from_environment", "cudnn")
    sentence = _refused(arguments, capsys)
    assert "FULLATTN_BACKEND must be one of" in sentence
    assert "'cudnn'" in sentence


def test_a_comparison_under_other_conditions_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _bench(folder="before")
    capsys.readouterr()
    sentence = _refused([*QUICK, "--dtype", "float64", "--compare", "before/bench.json"], capsys)
    assert "expected an old run with dtype float64 to compare with, got float32" in sentence


def test_a_missing_extra_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    assert "needs rich: pip install 'fullattn[bench]'" in _refused(QUICK, capsys)


def test_a_disk_that_fills_up_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fullattn.bench.chart.draw", full)
    assert "no space left on device" in _refused([*QUICK, "--output", "deep/out"], capsys).lower()


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    Path("slow.py").write_text(
        "import time, pathlib\nfrom torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self, channels):\n        super().__init__()\n"
        "    def forward(self, x):\n"
        "        pathlib.Path('began').touch()\n        time.sleep(0.2)\n        return x\n"
    )
    command = [*QUICK, "--repeats", "1000", "--module", "slow.py:Block", "--output", "deep/out"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fullattn", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        # A shell lets its background jobs ignore SIGINT, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for _ in range(600):
            if Path("began").exists():
                break
            time.sleep(0.1)
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    # To a shell both are 130. CPython ends by the signal where it fell into an exec() of a string,
    # as a dataclass is made, whoever caught the exception then.
    assert running.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err
    assert "interrupted, nothing was written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["began", "slow.py"]
