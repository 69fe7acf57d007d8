"""`fullattn swap`: the table of a network before and after, and one sentence for bad input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fullattn._cli.main import main

pytest.importorskip("rich", reason="fullattn swap needs rich")
pytest.importorskip("matplotlib", reason="fullattn swap needs matplotlib")
Image = pytest.importorskip("PIL.Image", reason="fullattn swap needs pillow")

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
