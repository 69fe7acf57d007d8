"""mix_images=True is the official implementation, batches included, and nothing else is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fullattn
from fullattn import FullyAttentional, attention, costs
from fullattn.layers import mixing
from helpers import official_code
from helpers.cases import SIZES, assert_near
from helpers.processes import run_program

pytestmark = pytest.mark.filterwarnings("ignore:mix_images=True:UserWarning")


def build(channels: int, **options: object) -> FullyAttentional:
    torch.manual_seed(0)
    given = {"project": False, "gamma_init": 0.7, "dtype": torch.float64, **options}
    return FullyAttentional(channels, mix_images=True, **given)  # type: ignore[arg-type]


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def official(layer: FullyAttentional, x: Tensor) -> Tensor:
    return official_code.fully_attentional(x, layer.column_key, layer.row_key, layer.gamma)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "chunked"])
@given(
    batch=st.integers(1, 4),
    channels=st.sampled_from([1, 3, 8]),
    height=st.sampled_from(SIZES),
    width=st.sampled_from(SIZES),
)
def test_every_backend_equals_the_official_code_forward_and_backward(
    backend: str, batch: int, channels: int, height: int, width: int
) -> None:
    layer, x = build(channels), image(batch, channels, height, width).requires_grad_()
    direction = image(batch, channels, height, width)
    inputs = [x, *layer.parameters()]
    with fullattn.backend(backend):
        y = layer(x)
    expected = official(layer, x)
    assert (y - expected).abs().max() <= 1e-10 * expected.abs().max()
    actual = torch.autograd.grad(y, inputs, direction)
    for one, other in zip(actual, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert_near(one, other, torch.float64, size=1.0)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_maps_are_those_that_forward_multiplies_with(batch: int) -> None:
    layer, x = build(5), image(batch, 5, 4, 7)
    maps = layer.similarity(x)
    columns = torch.einsum("bwij,bjhw->bihw", maps.columns, x)
    rows = torch.einsum("bhij,bjhw->bihw", maps.rows, x)
    assert_near(x + layer.gamma * (columns + rows), layer(x), torch.float64)


def test_only_this_mode_mixes_and_only_in_batches() -> None:
    layer, x = build(5), image(2, 5, 4, 7)
    alone = FullyAttentional(5, project=False, gamma_init=0.7, dtype=torch.float64)
    alone.load_state_dict(layer.state_dict())
    assert_near(alone(x)[:1], alone(x[:1]), torch.float64)
    assert (layer(x)[:1] - layer(x[:1])).abs().max() > 0.01
    assert_near(layer(x[:1]), alone(x[:1]), torch.float64)
    assert_near(layer(x[0]), alone(x[0]), torch.float64)
    assert not alone.mix_images


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert build(5)(image(0, 5, 4, 7)).shape == (0, 5, 4, 7)


def test_the_function_without_gamma_is_the_attention_alone() -> None:
    layer, x = build(5), image(2, 5, 4, 7)
    column_key, row_key = layer.column_key(x.mean(3).mT).mT, layer.row_key(x.mean(2).mT).mT
    attended, added = attention.run(mixing.mixed_call(x, column_key, row_key))
    assert not added
    assert_near(x + layer.gamma * attended, layer(x), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_near_float64(dtype: torch.dtype) -> None:
    layer, x = build(5, scale=None, dtype=torch.float32), image(2, 5, 4, 7).float()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert_near(y, copy.deepcopy(layer).double()(x.double()), dtype)


def test_copies_mix_too_and_the_repr_says_so() -> None:
    layer, x = build(5), image(2, 5, 4, 7)
    assert layer.extra_repr() == "5, gamma_init=0.7, project=False, mix_images=True"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)


@pytest.mark.slow
def test_compiled_and_exported_with_free_sizes_it_mixes_the_same_images() -> None:
    layer = build(6)
    free = torch.export.Dim("batch"), torch.export.Dim("height"), torch.export.Dim("width")
    dynamic = (dict(zip((0, 2, 3), free, strict=True)),)
    program = torch.export.export(layer, (image(2, 6, 8, 9),), dynamic_shapes=dynamic).module()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 6, 7, 5), (4, 6, 2, 9)):
        assert_near(program(image(*shape)), official(layer, image(*shape)), torch.float64)
        assert_near(compiled(image(*shape)), official(layer, image(*shape)), torch.float64)
    torch._dynamo.reset()


def test_costs_have_no_formula_for_it() -> None:
    with pytest.raises(ValueError, match="without mix_images=True, for which there is no formula"):
        costs.cost(build(5), (1, 5, 4, 7))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_of_whole_layers_says_that_it_cannot(backend: str) -> None:
    with pytest.raises(fullattn.BackendError, match=backend):
        build(5, backend=backend)(image(2, 5, 4, 7))


@pytest.fixture
def nobody_warned() -> Iterator[None]:
    mixing.warn.cache_clear()
    yield
    mixing.warn.cache_clear()


@pytest.mark.usefixtures("nobody_warned")
def test_the_warning_names_the_line_that_made_the_layer() -> None:
    with pytest.warns(UserWarning, match="images of a batch influence each other") as caught:
        FullyAttentional(5, mix_images=True)
    assert caught[0].filename == __file__


def test_it_warns_once_in_a_process_and_the_default_never() -> None:
    program = (
        "import torch, warnings, fullattn\n"
        "warnings.simplefilter('always')\n"
        "fullattn.FullyAttentional(4)\n"
        "layers = [fullattn.FullyAttentional(4, mix_images=True) for _ in range(3)]\n"
        "layers[0](torch.randn(2, 4, 5, 6))\n"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert done.stderr.count("for nothing else") == 1
