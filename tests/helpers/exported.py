"""Programs that leave PyTorch: ONNX and AOTInductor, with dynamic batch, height and width."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compiled import pooling_exports

# Warnings of torch.export's own code, and of a PyTorch module that AOTInductor imports.
EXPORT_WARNINGS = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
]


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip where a package is not installed, and say which."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, not installed")


needs_onnx = needs("onnx", "onnxscript", "onnxruntime")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")),
    reason="needs a C++ compiler, found none",
)

# Shapes other than the exported (2, 6, 8, 9).
UNSEEN = ((3, 6, 7, 5), (1, 6, 5, 13), (5, 6, 4, 31))


def free_sizes(smallest: int) -> tuple[dict[int, Any], ...]:
    """Return dynamic shapes of one feature map, with fixed channels."""
    return (
        {
            0: torch.export.Dim("batch"),
            2: torch.export.Dim("height", min=smallest),
            3: torch.export.Dim("width", min=smallest),
        },
    )


def smallest_size(layer: nn.Module) -> int:
    """Return the smallest height and width of a layer exported with dynamic sizes."""
    subsample = getattr(layer, "subsample", 1)
    if subsample > 1 and not pooling_exports():
        pytest.skip("this version of PyTorch does not export max_pool2d with free sizes")
    # PyTorch fixes a pooled size that may be 1, so a subsampled layer starts at twice the pooling.
    return 2 * subsample


def onnx_program(model: nn.Module, x: Tensor, smallest: int) -> bytes:
    """Export a model to ONNX with dynamic batch, height and width."""
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=free_sizes(smallest), verbose=False
    )
    assert program is not None
    written: bytes = program.model_proto.SerializeToString()
    return written


def onnx_runtime(program: bytes) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an ONNX program."""
    import onnxruntime

    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert [given.shape[axis] for axis in (0, 2, 3)] == ["batch", "height", "width"]

    def run(x: Tensor) -> Tensor:
        return torch.as_tensor(session.run(None, {given.name: x.numpy()})[0])

    return run


def aot_inductor(model: nn.Module, x: Tensor, smallest: int, folder: Path) -> Any:
    """Write an AOTInductor package with dynamic batch, height and width, and load it."""
    program = torch.export.export(model, (x,), dynamic_shapes=free_sizes(smallest), strict=True)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2")
    )
    return torch._inductor.aoti_load_package(package)
