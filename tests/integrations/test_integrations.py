"""Registration of the layers with other libraries."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn.integrations import torchvision
from helpers.networks import load
from helpers.processes import run_program

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

LAYERS = {
    "FullyAttentional": FullyAttentional,
    "ChannelNonLocal": ChannelNonLocal,
    "SpatialNonLocal": SpatialNonLocal,
}


def test_an_import_registers_nothing_and_imports_no_other_library() -> None:
    program = (
        "import sys, fullattn, fullattn.swap\n"
        "print(sorted({'timm', 'torchvision', 'mmengine', 'mmcv'} & set(sys.modules)))"
    )
    done = run_program(program)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", LAYERS)
def test_mmengine_builds_the_layers_by_name_once_registered(name: str) -> None:
    cnn = load("mmcv")
    registry = pytest.importorskip("mmengine.registry", reason="mmengine is not installed")
    from fullattn.integrations import mmengine

    mmengine.register()
    mmengine.register()
    layer = registry.MODELS.build({"type": name, "in_channels": 8, "backend": "reference"})
    assert isinstance(layer, LAYERS[name])
    assert (layer.channels, layer.backend) == (8, "reference")
    LAYERS[name](8).load_state_dict(layer.state_dict())
    _, plugin = cnn.build_plugin_layer({"type": name}, "_1", in_channels=8)
    assert plugin.channels == 8
    twin = pickle.loads(pickle.dumps(layer))
    assert type(twin) is type(layer)
    x = torch.randn(1, 8, 5, 6)
    assert torch.equal(twin.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("layer", LAYERS.values())
def test_timm_takes_the_layers_and_traces_around_them(layer: Any) -> None:
    timm = load("timm")
    from fullattn.integrations import timm as integration

    integration.register()
    model = timm.create_model(
        "resnet26",
        pretrained=False,
        features_only=True,
        feature_cls="fx",
        out_indices=(2,),
        block_args={"attn_layer": layer},
    )
    assert any(isinstance(module, layer) for module in model.modules())
    (y,) = model(torch.zeros(2, 3, 64, 64))
    assert y.shape == (2, 512, 8, 8)


def test_torchvision_is_importable_and_stays_so() -> None:
    torchvision.ensure_importable()
    load("torchvision")
    before = sys.modules["torchvision"]
    torchvision.ensure_importable()
    assert sys.modules["torchvision"] is before


def test_torchvision_is_importable_after_an_import_that_failed() -> None:
    pytest.importorskip("torchvision", exc_type=Exception)
    program = """
import importlib
try:
    import torchvision
except RuntimeError:
    pass
from fullattn.integrations.torchvision import ensure_importable
ensure_importable()
import torchvision.models
"""
    subprocess.run([sys.executable, "-c", program], check=True)
