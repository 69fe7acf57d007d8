"""`fullattn swap`: the table of a network before and after, and one sentence for bad input."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from fullattn import SpatialNonLocal, swap
from fullattn._cli.conditions import Conditions, environment
from fullattn._cli.main import main
from fullattn._cli.shapes import Shape

pytest.importorskip("rich", reason="fullattn swap needs rich")
pytest.importorskip("matplotlib", reason="fullattn swap needs matplotlib")
Image = pytest.importorskip("PIL.Image", reason="fullattn swap needs pillow")

from fullattn.bench.results import Failure, Measurement  # noqa: E402
from fullattn.swap import before_after  # noqa: E402
from fullattn.swap.before_after import Side, print_report, print_sides  # noqa: E402
from fullattn.swap.network import Network  # noqa: E402
from helpers.terminal import each_width, fitting  # noqa: E402

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=16, *, name="net"):
        super().__init__()
        assert name == "net", name
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.body = nn.Conv2d(channels, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return {"out": self.head(self.body(self.stem(x))), "aux": None}

class Strict(Net):
    def forward(self, x):
        assert not self.training, "cannot be trained"
        return super().forward(x)

def nothing():
    return None
"""
QUICK = ["--shape", "3x16x12", "--repeats", "2", "--threads", "1", "--no-memory"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["swap", *arguments, *QUICK]) == 0
    return capsys.readouterr().out


# As wide as numbers become.
LARGE = Measurement([123456.0, 133456.0, 143456.0], 2**40)
REASON = "one call did not end within 30 s (--limit)"
SIDES = {
    "before": Side(10**9, 10**15, {"inference": LARGE, "training": LARGE}),
    "after": Side(
        10**9,
        None,
        {"inference": LARGE, "training": Measurement(failure=Failure("too slow", REASON))},
    ),
}


@each_width
def test_the_table_fits_the_terminal(width: int) -> None:
    network = Network("torchvision.models:resnet50", {}, Shape(1, 3, 9, 9), Conditions(), "layer4")
    here = environment(torch.device("cpu"))
    text = fitting(lambda console: print_sides(network, SIDES, here, console), width)
    assert f"after, forward + backward: {REASON}" in text
    assert "FullyAttentional in place of layer4, inference: no difference in time" in text


@each_width
def test_the_report_fits_the_terminal(width: int) -> None:
    model = nn.Sequential(OrderedDict(a_long_name=nn.ConvTranspose2d(2048, 256, 3, padding=1)))
    report = swap(model, "a_long_name", SpatialNonLocal, sample_input=torch.zeros(1, 2048, 32, 32))
    said = "becomes FLOPs at, channels 2048 → 256, parameters"
    given = " ".join(f"{word} {word}, {word}:" for word in str(report).split())
    text = fitting(lambda console: print_report(report, console), width, said, given)
    for part in ("ConvTranspose2d", "SpatialNonLocal", "2048 → 256", "1×2048×32×32", "precedes"):
        assert part in " ".join(text.split())


def test_the_report_is_printed_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        before_after, "measure_group", lambda *args, **options: said.append(capsys.readouterr().out)
    )
    with pytest.raises(TypeError, match="NoneType"):  # nothing was measured
        main(["swap", "net.py:Net", "--target", "body", *QUICK])
    assert "1×1, FullyAttentional" in said[0]


def test_a_budget_used_up_leaves_out_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "net.py:Net", "--target", "body", "--budget", "1e-9")
    assert "no time left" not in row(text, "forward, ms")
    assert row(text, "forward + backward, ms") == ["no time left", "no time left", "–"]


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(f"{name}  "))
    return re.split(r"  +", line.strip())[1:]


def test_the_table_has_parameters_flops_and_time_of_both(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = output(capsys, "net.py:Net", "--target", "body", "--layer-options", "project=False")
    pixels = 8 * 6
    stem, body, head = 3 * 16 * 9 + 16, 16 * 8 * 9 + 8, 8 * 5 + 5
    adapter, layer = 16 * 8 + 8, 2 * (8 * 8 + 8) + 1
    assert row(text, "parameters")[:2] == [
        f"{(stem + body + head) / 1e3:.2f}K",
        str(stem + adapter + layer + head),
    ]
    around = 2 * pixels * (3 * 16 * 9 + 8 * 5)
    before = around + 2 * pixels * 16 * 8 * 9
    after = around + 2 * pixels * 16 * 8 + 8 * 8 * 8 * pixels + 2 * 8 * 8 * (8 + 6)
    assert row(text, "FLOPs")[:2] == [f"{before / 1e3:.0f}K", f"{after / 1e3:.1f}K"]
    assert "±" in row(text, "forward, ms")[0]
    assert "±" in row(text, "forward + backward, ms")[1]
    assert "body" in text
    assert "1×1, FullyAttentional" in text


def test_insert_puts_the_layer_behind(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(
        capsys,
        *("net.py:Net", "--insert", "--target", "stem", "--layer", "channel"),
        *("--model-options", "channels=6", "name=net", "--mode", "inference"),
    )
    assert "Conv2d, ChannelNonLocal" in text
    assert "1×6×8×6" in text
    assert "backward, ms" not in text


def test_memory_is_measured_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["swap", "net.py:Net", "--insert", "--target", "stem", "--mode", "inference"]
    assert main([*arguments, "--shape", "3x512x512", "--repeats", "1", "--threads", "1"]) == 0
    before, after, _ = row(capsys.readouterr().out, "forward, peak MiB")
    largest = 16 * 256 * 256 * 4 / 2**20  # the stem's result
    assert float(before) >= largest
    assert float(after) >= float(before)


def test_a_photograph_is_the_input(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), (200, 30, 90)).save("photo.png")
    text = output(capsys, "net.py:Net", "--target", "body", "--image", "photo.png")
    assert "image photo.png" in text


def test_a_network_that_cannot_be_trained_is_measured_in_inference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = output(capsys, "net.py:Strict", "--target", "body")
    assert "±" in row(text, "forward, ms")[0]
    assert row(text, "forward + backward, ms") == ["failed", "failed", "–"]
    assert "before, forward + backward: AssertionError: cannot be trained" in text


def test_a_network_that_never_runs_is_one_sentence_after_the_report(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["net.py:Strict", "--target", "body", "--mode", "training"]
    assert main(["swap", *arguments, *QUICK]) == 2
    out, err = capsys.readouterr()
    assert "1×1, FullyAttentional" in out
    assert "before" not in out
    assert err == "fullattn: the model does not run: AssertionError: cannot be trained\n"
