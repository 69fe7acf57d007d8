"""OpenVINO's converter, from PyTorch: every form of the layers equals eager at unseen sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal

openvino: Any = pytest.importorskip("openvino", reason="openvino is not installed")
pytestmark = [pytest.mark.isolated, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CHANNELS = 16
LAYERS: dict[str, Any] = {
    "fully": lambda: FullyAttentional(CHANNELS, project=False, gamma_init=0.7),
    "fully projected": lambda: FullyAttentional(CHANNELS, gamma_init=0.7),
    "fully scaled": lambda: FullyAttentional(CHANNELS, scale=None, gamma_init=0.7),
    "channel": lambda: ChannelNonLocal(CHANNELS, gamma_init=0.7),
    "channel least similar": lambda: ChannelNonLocal(CHANNELS, gamma_init=0.7, least_similar=True),
    **{
        f"spatial {mode}{' DANet' if danet else ''}": lambda mode=mode, danet=danet: (
            SpatialNonLocal(CHANNELS, mode=mode, project=False, gamma_init=0.7)
            if danet
            else SpatialNonLocal(CHANNELS, mode=mode, zero_init=False)
        )
        for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
        for danet in (False, True)
    },
    "spatial subsampled": lambda: SpatialNonLocal(CHANNELS, subsample=2, zero_init=False),
}


def images(*shape: int) -> Tensor:
    # Small, as with large features a softmax is one-hot and hides a wrong product.
    return 0.15 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(model: Any, x: Tensor) -> Tensor:
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return torch.as_tensor(openvino.Core().compile_model(model, "CPU", options)([x.numpy()])[0])


@pytest.mark.parametrize("through", ["trace", pytest.param("export", marks=pytest.mark.network)])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_converted_network_equals_eager_at_unseen_sizes(layer: str, through: str) -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)
    net = nn.Sequential(first, LAYERS[layer](), last).eval()
    x = images(2, CHANNELS, 9, 12)
    if through == "trace":
        model = openvino.convert_model(net, example_input=x, input=[-1, CHANNELS, -1, -1])
    else:
        dim = torch.export.Dim
        free = {0: dim("b", max=64), 2: dim("h", min=4, max=64), 3: dim("w", min=4, max=64)}
        program = torch.export.export(net, (x,), dynamic_shapes=(free,))
        if layer == "fully scaled":  # 1/√H of a free H
            with pytest.raises(Exception, match=r"No conversion rule found for operations: .*pow"):
                openvino.convert_model(program)
            return
        model = openvino.convert_model(program)
    for given in (x, images(1, CHANNELS, 5, 7), images(3, CHANNELS, 16, 8)):
        with torch.no_grad():
            expected = net(given)
        error = (run(model, given) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, tuple(given.shape)
