"""torch.compile without graph breaks, torch.export with free sizes, PyTorch's operator checks."""

from __future__ import annotations

import shutil
from functools import cache

import pytest
import torch
from torch import Tensor

import fullattn
from fullattn._versions import VERSION
from fullattn.attention import ScoreFunction
from fullattn.attention.dispatch import BACKENDS
from helpers.cases import (
    CASES,
    CHANNEL,
    FULLY_ATTENTIONAL,
    SPATIAL,
    SPATIAL_DOT_PRODUCT,
    SPATIAL_SUBSAMPLED,
    Case,
    Run,
    assert_near,
    runs,
)
from helpers.compiled import assert_same, images, output_and_gradients, pooling_exports

pytestmark = pytest.mark.slow


def assert_compiles(layer: torch.nn.Module, *, dynamic: bool, backend: str = "aot_eager") -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for x in images((2, 6, 4, 5), (3, 6, 9, 7))[: 1 + dynamic]:
        actual = output_and_gradients(compiled, layer, x)
        assert_same(actual, output_and_gradients(layer, layer, x), torch.float32)


@runs(torch.float32)
def test_compiled_without_graph_breaks_agrees_with_eager(run: Run) -> None:
    with run.forced():
        assert_compiles(run.build(6), dynamic=False)


# Symbolic sizes take AOTAutograd seconds. So Dynamo alone sees every form, and `make networks` has
# it on every backend of each layer's first form; below, Inductor has it on three forms.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_form_compiles_with_dynamic_sizes(case: Case) -> None:
    assert_compiles(case.build(6, torch.float32), dynamic=True, backend="eager")


@pytest.mark.network
@runs(torch.float32, cases=(FULLY_ATTENTIONAL, CHANNEL, SPATIAL))
def test_every_backend_compiles_with_dynamic_sizes(run: Run) -> None:
    with run.forced():
        assert_compiles(run.build(6), dynamic=True)


def test_one_compiled_graph_serves_all_sizes() -> None:
    layer = FULLY_ATTENTIONAL.build(6, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    first, *others = images((2, 6, 4, 5), (3, 6, 9, 7), (4, 6, 3, 11))
    compiled(first)
    if VERSION < (2, 8):
        pytest.skip("PyTorch before 2.8 has one graph for H > W and one for the rest")
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in others:
            assert_near(compiled(x), layer(x), torch.float32)


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")),
    reason="inductor needs a C++ compiler",
)
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize(
    ("case", "dynamic"),
    [
        (FULLY_ATTENTIONAL, True),
        (SPATIAL, False),
        # Inductor (torch 2.6 to 2.13) cannot order the strides of a view of free sizes that is
        # saved for backward or goes into a convolution, so there must be none.
        (SPATIAL, True),
        (SPATIAL_DOT_PRODUCT, True),
    ],
    ids=lambda given: given.name if isinstance(given, Case) else "dynamic" if given else "static",
)
def test_compiled_by_inductor_agrees_with_eager(case: Case, dynamic: bool) -> None:
    layer = case.build(6, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for x in images((2, 6, 4, 5), (3, 6, 9, 7))[: 1 + dynamic]:
        actual = output_and_gradients(compiled, layer, x)
        assert_same(actual, output_and_gradients(layer, layer, x), torch.float32)


def test_compiled_code_follows_the_chosen_backend() -> None:
    layer = FULLY_ATTENTIONAL.build(6, torch.float32)
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        seen.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=spy)
    (x,) = images((2, 6, 4, 5))
    # Before 2.7 a compilation cannot be told from an export, which has PyTorch's own operators.
    of_sdpa = "attend_sdpa" if hasattr(torch.compiler, "is_exporting") else "scaled_dot_product"
    for name, trace in (("reference", "softmax"), ("sdpa", of_sdpa)):
        with fullattn.backend(name):
            compiled(x)
        assert trace in seen[-1]
    assert len(seen) == 2


def test_compiled_under_autocast_agrees_with_eager() -> None:
    layer = FULLY_ATTENTIONAL.build(6, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (x,) = images((2, 6, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(compiled(x), layer(x), torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_with_free_sizes_agrees_with_eager(case: Case, strict: bool) -> None:
    assert_exports(case.build(6, torch.float32).eval(), strict)


@pytest.mark.parametrize(
    "layer",
    [fullattn.FullyAttentional(6), fullattn.ChannelNonLocal(6), fullattn.SpatialNonLocal(6)],
    ids=lambda layer: type(layer).__name__,
)
def test_the_default_form_exports_with_free_sizes(layer: torch.nn.Module) -> None:
    assert_exports(layer.eval(), strict=True)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch before 2.7 does not say it exports"
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_exported_program_can_be_loaded_without_this_package(case: Case) -> None:
    (x,) = images((2, 6, 8, 9))
    program = torch.export.export(case.build(6, torch.float32).eval(), (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert not any("fullattn" in name for name in called)


@pytest.mark.filterwarnings("ignore:At pre-dispatch tracing")  # PyTorch 2.4
@runs(torch.float32, cases=(FULLY_ATTENTIONAL, CHANNEL, SPATIAL_SUBSAMPLED))
def test_every_backend_exports_with_free_sizes(run: Run) -> None:
    with run.forced():
        assert_exports(run.build(6).eval(), strict=False)


@cache
def assert_exports(layer: torch.nn.Module, strict: bool) -> None:
    """Fail unless the layer exports with free B, H and W and agrees at sizes not seen then."""
    if VERSION < (2, 6) and getattr(layer, "mode", None) == "concatenation":
        pytest.skip("PyTorch before 2.6 fixes the batch of the concatenation form")
    if getattr(layer, "subsample", 1) > 1 and not pooling_exports():
        pytest.skip("this version of PyTorch does not export max_pool2d with free sizes")
    # PyTorch fixes a pooled size that may be 1, so a subsampled layer starts at twice the pooling.
    smallest = 2 * getattr(layer, "subsample", 1)
    batch = torch.export.Dim("batch")
    height, width = (
        torch.export.Dim("height", min=smallest),
        torch.export.Dim("width", min=smallest),
    )
    (x,) = images((2, 6, 8, 9))
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({0: batch, 2: height, 3: width},), strict=strict
    )
    exported = program.module()
    for x in images((3, 6, 7, 5), (2, 6, smallest, 31), (5, 6, 20, 4)):
        assert_near(exported(x), layer(x), torch.float32)


OPERATORS = sorted(
    name.removeprefix("fullattn::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fullattn::")
)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("slices", [1, 5], ids=["shared", "own"])
def test_operators_pass_the_checks_of_torch_library(name: str, strided: bool, slices: int) -> None:
    backend = name.removeprefix("attend_").removesuffix("_backward").removesuffix("_with_residual")
    (entry,) = (entry for entry in BACKENDS if entry.name == backend)
    if reason := entry.unavailable():
        pytest.skip(f"{backend}: {reason}")
    if ScoreFunction.SOFTMAX in entry.attend:
        features = 6 if backend == "sdpa" else 3  # its callers pad features to those of the value
        grad, query, key, value = images(
            (2, 5, 7, 6), (2, 5, 7, features), (2, slices, 4, features), (2, slices, 4, 6)
        )
        if backend == "sdpa":
            key, value = (x.expand(-1, 5, -1, -1) for x in (key, value))
    else:
        grad, query, key, value = images((2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4), (2, 3, 5))
    if strided and backend != "sdpa":
        grad, query = (x.mT.contiguous().mT for x in (grad, query))
    inputs = [query, key, value]
    if name.endswith("backward"):  # it has no derivative of its own
        inputs.insert(0, grad)
        if backend == "sdpa":
            inputs += torch.ops.fullattn.attend_sdpa(*inputs[1:], 0.5)
    elif name.endswith("residual"):  # for inference alone
        inputs.append(torch.full((1,), 0.7))
    else:
        inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(getattr(torch.ops.fullattn, name).default, (*inputs, 0.5))
