"""A hundred and more bad calls of the commands: one sentence, exit status 2, nothing written."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fullattn._cli.main import main
from fullattn.integrations.torchvision import ensure_importable
from helpers import tiny_data

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
ensure_importable()
pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")

MODULES = """
import torch
from torch import nn
number = 3
def function(channels): return None
class Picky(nn.Module):
    def __init__(self): super().__init__()
class Cropping(nn.Module):
    def __init__(self, channels): super().__init__()
    def forward(self, x): return x[..., 1:, 1:]
class Strings(nn.Module):
    def __init__(self, channels): super().__init__()
    def forward(self, x): return "x"
class Net(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.body = nn.Conv2d(channels, channels, 3, padding=1)
    def forward(self, x): return self.body(self.stem(x))
class Strict(Net):
    def train(self, mode=True):
        assert not mode, "cannot be trained"
        return super().train(mode)
class Crashing(nn.Module):
    def __init__(self):
        super().__init__()
        1 / 0
"""

BENCH = "bench --shapes 4x5x6 --layers channel --backends reference --repeats 1 --no-memory "
SWAP = "swap --shape 3x12x16 --repeats 1 --no-memory "
TRAIN = "train camvid_small --data camvid --output out "
SMALL = (
    "--set model.backbone=test_resnet model.channels=8 model.out_channels=8 model.pretrained=false "
    "model.backbone_options={} data.crop=[32,32] data.workers=0 training.steps=1 "
    "training.batch_size=2 "
)
EVALUATE = "evaluate net.ckpt --data camvid camvid "
PREDICT = "predict street.png --checkpoint net.ckpt --output out "
MAPS = "maps street.png --output out "

CALLS = [
    # fullattn itself
    ("fly", "'fly'"),
    ("--colour", "required: COMMAND"),
    # bench: shapes and conditions
    (BENCH + "--shapes 512x97", "'512x97'"),
    (BENCH + "--shapes 4x0x5", "'4x0x5'"),
    (BENCH + "--shapes -1x5x5", "--shapes"),
    (BENCH + "--shapes 1x2x3x4x5", "'1x2x3x4x5'"),
    (BENCH + "--shapes voc", "'voc'"),
    (BENCH + "--shapes", "--shapes"),
    (BENCH + "--shapes 99999x9999x9999", "GiB"),
    (BENCH + "--dtype int8", "'int8'"),
    ("bench --shapes 99999999x4x4 --budget 5", "99999999x4x4"),
    ("bench --shapes 9999999999x99999x99999", "elements"),
    ("info --shape 9999999999x99999x99999", "elements"),
    (SWAP + "mine.py:Net --target body --shape 1x3x999999x999999", "999999"),
    (BENCH + "--memory-format nhwc", "'nhwc'"),
    (BENCH + "--device cuda:99", "'cuda:99'"),
    (BENCH + "--device tpu!", "'tpu!'"),
    (BENCH + "--device meta", "'meta'"),
    (BENCH + "--mode backward", "'backward'"),
    (BENCH + "--sweep batch", "'batch'"),
    (BENCH + "--sweep channels --shapes 4x5x6 4x6x6", "got 2"),
    (BENCH + "--repeats 0", "'0'"),
    (BENCH + "--repeats 1.5", "'1.5'"),
    (BENCH + "--threads many", "'many'"),
    (BENCH + "--seed -1", "-1"),
    (BENCH + "--seed 99999999999999999999", "99999999999999999999"),
    (BENCH + "--seconds -1", "-1"),
    (BENCH + "--seconds inf", "'inf'"),
    (BENCH + "--limit nan", "'nan'"),
    (BENCH + "--budget 0", "'0'"),
    (BENCH + "--colour", "--colour"),
    (BENCH + "extra", "extra"),
    # bench: what is compared
    (BENCH + "--layers temporal", "'temporal'"),
    (BENCH + "--layers gone.py:Layer", "'gone.py'"),
    (BENCH + "--layers mine.py:Net", "Net"),
    (BENCH + "--backends cudnn", "'cudnn'"),
    (BENCH + "--baseline best", "'best'"),
    (BENCH + "--module missing.py:Block", "'missing.py'"),
    (BENCH + "--module mine.py", "'mine.py'"),
    (BENCH + "--module mine.py:", "'mine.py:'"),
    (BENCH + "--module mine.py:Missing", "'Missing'"),
    (BENCH + "--module mine.py:number", "got int"),
    (BENCH + "--module mine.py:function", "got NoneType"),
    (BENCH + "--module mine.py:Picky", "TypeError"),
    (BENCH + "--module mine.py:Cropping", "expected an output of shape (1, 4, 5, 6), got (1"),
    (BENCH + "--module mine.py:Strings", "got str"),
    (BENCH + "--module broken.py:Block", "ZeroDivisionError"),
    (BENCH + "--module wrong.py:Block", "SyntaxError"),
    (BENCH + "--module quits.py:Block", "SystemExit"),
    (BENCH + "--module no.such.module:Block", "ModuleNotFoundError"),
    (BENCH + "--module mine.py:Net --module mine.py:Net", "twice"),
    (BENCH + "--contender missing.py:Block", "'missing.py'"),
    # bench: files
    (BENCH + "--image missing.png", "'missing.png'"),
    (BENCH + "--image mine.py", "'mine.py'"),
    (BENCH + "--image cut.png", "'cut.png'"),
    (BENCH + "--image camvid", "'camvid'"),
    (BENCH + "--output mine.py", "'mine.py'"),
    (BENCH + "--output mine.py/deeper", "'mine.py/deeper'"),
    (BENCH + "--compare missing.json", "'missing.json'"),
    (BENCH + "--compare mine.py", "'mine.py'"),
    (BENCH + "--compare other.json", "'other.json'"),
    (BENCH + "--compare old.json", "schema"),
    # swap
    (SWAP + "mine.py:Net", "--target"),
    (SWAP + "mine.py:Net --target bodi", "'body'"),
    (SWAP + "mine.py:Net --target ''", "itself"),
    (SWAP + "mine.py:Net --target 'x*'", "'x*'"),
    (SWAP + "mine.py:Net --target stem", "from 12×16 to 6×8"),
    (SWAP + "mine.py:Nett --target body", "'Nett'"),
    (SWAP + "no_such:Net --target body", "ModuleNotFoundError"),
    (SWAP + "none.py:Net --target body", "'none.py'"),
    (SWAP + "mine.py --target body", "FILE.py:NAME"),
    (SWAP + "mine.py:number --target body", "got int"),
    (SWAP + "mine.py:Crashing --target body", "ZeroDivisionError"),
    (SWAP + "mine.py:Net --target body --layer self", "'self'"),
    (SWAP + "mine.py:Net --target body --model-options x=1", "cannot be built with"),
    (SWAP + "mine.py:Net --target body --model-options x", "NAME=VALUE"),
    (SWAP + "mine.py:Net --target body --layer-options x=1", "'x'"),
    (SWAP + "mine.py:Net --target body --shape 3x0x9", "'3x0x9'"),
    (SWAP + "mine.py:Net --target body --shape 4x9x9", "does not run"),
    (SWAP + "mine.py:Net --target body --image no.png", "'no.png'"),
    (SWAP + "mine.py:Net --target body --image street.png --shape 4x9x9", "3 channels"),
    (SWAP + "mine.py:Net --target body --dtype int8", "'int8'"),
    # info
    ("info --shape 12", "'12'"),
    ("info --layer temporal", "'temporal'"),
    ("info --dtype complex64", "'complex64'"),
    ("info --device cuda:99", "'cuda:99'"),
    ("info now", "now"),
    # train: the configuration
    ("train", "CONFIG"),
    ("train camvid_small", "--data"),
    ("train camvid_tiny --data camvid --output out", "'camvid_tiny'"),
    ("train gone.yaml --data camvid --output out", "gone.yaml"),
    ("train mine.py --data camvid --output out", "'mine.py'"),
    ("train list.yaml --data camvid --output out", "list.yaml"),
    ("train tabs.yaml --data camvid --output out", "tabs.yaml"),
    ("train twice.yaml --data camvid --output out", "twice"),
    (TRAIN + "--set training.step=3", "did you mean 'training.steps'?"),
    (TRAIN + "--set trainings.steps=3", "trainings"),
    (TRAIN + "--set steps=3", "steps=3"),
    (TRAIN + "--set training.steps", "training.steps"),
    (TRAIN + "--set training.steps=0", "training.steps"),
    (TRAIN + "--set training.steps=1.5", "training.steps"),
    (TRAIN + "--set training.steps=many", "training.steps"),
    (TRAIN + "--set training.learning_rate=-1", "training.learning_rate"),
    (TRAIN + "--set training.learning_rate=.nan", "training.learning_rate"),
    (TRAIN + "--set training.momentum=1", "training.momentum"),
    (TRAIN + "--set data.crop=[1,2,3]", "data.crop"),
    (TRAIN + "--set data.crop=[0,5]", "data.crop"),
    (TRAIN + "--set data.flip=2", "data.flip"),
    (TRAIN + "--set data.scale=[2,1]", "data.scale"),
    (TRAIN + "--set model.output_stride=7", "model.output_stride"),
    (TRAIN + "--set model.auxiliary=1", "model.auxiliary"),
    (TRAIN + "--set 'model={'", "model="),
    (TRAIN + "--precision half", "half"),
    (TRAIN + "--strategy deepspeed", "deepspeed"),
    (TRAIN + "--seed x", "'x'"),
    (TRAIN + "--devices 0", "'0'"),
    # train: data, network, machine
    (TRAIN + SMALL + "data.name=imagenet", "imagenet"),
    (TRAIN + SMALL + "data.name=cityscapes", "Cityscapes"),
    (TRAIN + SMALL + "data.train=all", "'all'"),
    (TRAIN + SMALL + "data.crop=[49,64]", "49×64"),
    (TRAIN + SMALL + "model.backbone=resnet", "'resnet'"),
    (TRAIN + SMALL + "model.backbone_weights=gone.pt", "gone.pt"),
    (TRAIN + SMALL + "model.backbone_weights=mine.py", "mine.py"),
    (TRAIN + SMALL + "training.sync_batchnorm=true", "no GPU"),
    (TRAIN + SMALL + "--attention some", "some"),
    (TRAIN + SMALL + "--accumulate 3", "multiple of 3"),
    ("train camvid_small --data gone --output out " + SMALL, "gone"),
    ("train camvid_small --data camvid --output mine.py " + SMALL, "mine.py"),
    ("train camvid_small --data camvid --output camvid " + SMALL, "camvid"),
    # evaluate
    ("evaluate", "CHECKPOINT"),
    ("evaluate gone.ckpt --data camvid camvid", "gone.ckpt"),
    ("evaluate mine.py --data camvid camvid", "mine.py"),
    ("evaluate weights.pt --data camvid camvid", "weights.pt"),
    ("evaluate cut.ckpt --data camvid camvid", "cut.ckpt"),
    ("evaluate camvid --data camvid camvid", "camvid"),
    ("evaluate net.ckpt --data camvid", "--data"),
    ("evaluate net.ckpt --data imagenet camvid", "imagenet"),
    ("evaluate net.ckpt --data camvid gone", "gone"),
    (EVALUATE, "3 classes"),
    (EVALUATE + "--split all", "'all'"),
    (EVALUATE + "--only 'x*'", "'x*'"),
    (EVALUATE + "--scales 0", "0"),
    (EVALUATE + "--scales big", "'big'"),
    (EVALUATE + "--window 5", "'5'"),
    (EVALUATE + "--stride 5x5", "stride"),
    (EVALUATE + "--batch-size 0", "'0'"),
    (EVALUATE + "--workers -1", "-1"),
    (EVALUATE + "--precision int8", "'int8'"),
    (EVALUATE + "--device cuda:99", "'cuda:99'"),
    (EVALUATE + "--output camvid", "'camvid'"),
    # predict
    ("predict", "PHOTO"),
    ("predict street.png --output out", "--checkpoint"),
    ("predict street.png --checkpoint net.ckpt", "--output"),
    ("predict gone.png --checkpoint net.ckpt --output out", "gone.png"),
    ("predict cut.png --checkpoint net.ckpt --output out", "cut.png"),
    ("predict mine.py --checkpoint net.ckpt --output out", "mine.py"),
    ("predict street.png --checkpoint gone.ckpt --output out", "gone.ckpt"),
    ("predict street.png --checkpoint net.ckpt --output mine.py", "mine.py"),
    (PREDICT + "--alpha 2", "alpha"),
    (PREDICT + "--alpha x", "'x'"),
    (PREDICT + "--maps", "--maps"),
    (PREDICT + "--point 3,4", "--maps"),
    (PREDICT + "--maps --point 3", "'3'"),
    (PREDICT + "--maps --point 999,999", "999"),
    (PREDICT + "--maps --channel 99", "99"),
    (PREDICT + "--maps --point 3,4 --channel 1", "not allowed with"),
    # maps
    ("maps", "PHOTO"),
    ("maps gone.png --output out", "gone.png"),
    ("maps mine.py --output out", "mine.py"),
    ("maps cut.png --output out", "cut.png"),
    (MAPS + "--point x", "'x'"),
    (MAPS + "--point 999,999", "999"),
    (MAPS + "--channel 99", "99"),
    (MAPS + "--longest 0", "'0'"),
    (MAPS + "--layers temporal", "'temporal'"),
    (MAPS + "--scale x", "'x'"),
    (MAPS + "--checkpoint gone.ckpt", "gone.ckpt"),
    (MAPS + "--checkpoint net.ckpt --layers fully", "--layers"),
    (MAPS + "--checkpoint net.ckpt --backbone resnet18", "not allowed with"),
    (MAPS + "--backbone resnet", "resnet"),
    (MAPS + "--backbone resnet18 --channels 8", "--channels"),
    (MAPS + "--backbone resnet18 --weights gone.pt", "gone.pt"),
    (MAPS + "--weights gone.pt", "--backbone"),
    ("maps street.png --output mine.py", "mine.py"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the calls name."""
    from helpers import tiny_network

    folder = tmp_path_factory.mktemp("files")
    (folder / "mine.py").write_text(MODULES)
    (folder / "broken.py").write_text("1 / 0")
    (folder / "wrong.py").write_text("class:")
    (folder / "quits.py").write_text("raise SystemExit(5)")
    (folder / "other.json").write_text("{}")
    (folder / "old.json").write_text('{"kind": "fullattn bench", "schema": 0}')
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "tabs.yaml").write_text("model:\n\tbackbone: x\n")
    (folder / "twice.yaml").write_text("model:\n  backbone: a\n  backbone: b\n")
    photograph = tiny_network.street().permute(1, 2, 0).numpy().astype(np.uint8)
    Image.fromarray(photograph).save(folder / "street.png")
    shutil.copy(folder / "street.png", folder / "cut.png")
    tiny_data.truncate(folder / "cut.png", 0.3)
    tiny_data.camvid(folder / "camvid", images=2)
    tiny_network.save(folder / "net.ckpt", "fully")
    shutil.copy(folder / "net.ckpt", folder / "cut.ckpt")
    tiny_data.truncate(folder / "cut.ckpt")
    torch.save({"a": torch.zeros(1)}, folder / "weights.pt")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def test_there_are_a_hundred() -> None:
    assert len({call for call, _ in CALLS}) == len(CALLS) >= 100


@pytest.mark.parametrize(("call", "part"), CALLS, ids=[call or "nothing" for call, _ in CALLS])
def test_a_bad_call_is_one_sentence(
    call: str,
    part: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = contents(files)
    status = main(shlex.split(call))
    out, err = capfd.readouterr()
    assert status == 2, (out, err)
    assert out == ""
    assert err.startswith("fullattn")
    assert "[Errno" not in err
    assert err.count("\n") == 1, err
    assert part in err
    assert contents(files) == before
