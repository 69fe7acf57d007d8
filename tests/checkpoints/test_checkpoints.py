"""Other projects' weights in our layers: equal results, exact round trips, and clear errors."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fullattn
from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn.checkpoints import CheckpointError, convert, load, load_into, table
from fullattn.checkpoints.mappings import MAPPINGS, KeyMapping
from helpers import networks, official_code

pytestmark = pytest.mark.filterwarnings("ignore:mix_images=True:UserWarning")

EXACT = 1e-10
C, D = 8, 3


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with random numbers in every parameter and buffer."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        else:
            tensor.normal_(0.0, 0.5, generator=generator)
    return module


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Pair:
    """A layer of another project and ours with the options that make it the same.

    Attributes:
        name: for the test's id.
        source: as `convert` takes it.
        theirs: makes their layer for a number of channels.
        ours: makes ours.
        variant: as `convert` takes it in reverse.
        differentiable: whether theirs has a backward pass.
    """

    name: str
    source: Any
    theirs: Callable[[int], nn.Module]
    ours: Callable[[int], nn.Module]
    variant: str | None = None
    differentiable: bool = True


def flanet() -> Pair:
    return Pair(
        "flanet",
        "flanet",
        official_code.FullyAttentionalBlock,
        lambda c: FullyAttentional(c, mix_images=True),
    )


def timm(use_scale: bool) -> Pair:
    def theirs(c: int) -> nn.Module:
        attention = networks.load("timm").layers.NonLocalAttn
        layer: nn.Module = attention(c, use_scale=use_scale, rd_channels=D)
        return layer

    def ours(c: int) -> nn.Module:
        return SpatialNonLocal(c, inner_channels=D, scale=c**-0.5 if use_scale else 1.0)

    return Pair(f"timm-{use_scale=}", "timm", theirs, ours)


def mmcv(mode: Any, use_scale: bool, sub_sample: bool, norm: bool, reduction: int = 2) -> Pair:
    def theirs(c: int) -> nn.Module:
        layer: nn.Module = networks.load("mmcv").NonLocal2d(
            c,
            mode=mode,
            use_scale=use_scale,
            sub_sample=sub_sample,
            reduction=reduction,
            norm_cfg={"type": "BN"} if norm else None,
        )
        return layer

    def ours(c: int) -> nn.Module:
        return SpatialNonLocal(
            c,
            inner_channels=max(c // reduction, 1),
            mode=mode,
            scale=None if use_scale and mode == "embedded_gaussian" else 1.0,
            subsample=2 if sub_sample else 1,
            norm_layer=nn.BatchNorm2d if norm else None,
        )

    return Pair(
        f"mmcv-{mode}-{use_scale=}-{sub_sample=}-{norm=}-{reduction=}",
        "mmcv",
        theirs,
        ours,
        "sub_sample" if sub_sample else "plain",
        differentiable=mode != "concatenation",  # theirs divides in place what autograd kept
    )


def mmseg(name: str, *arguments: int) -> nn.Module:
    networks.load("mmseg")
    from mmseg.models.decode_heads import da_head

    layer: nn.Module = getattr(da_head, name)(*arguments)
    return layer


def danet_position(c: int) -> nn.Module:
    return SpatialNonLocal(c, inner_channels=D, project=False)


def danet_channel(c: int) -> nn.Module:
    return ChannelNonLocal(c, least_similar=True)


PAIRS = [
    flanet(),
    timm(use_scale=True),
    timm(use_scale=False),
    *(
        mmcv(mode, use_scale, sub_sample, norm)
        for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
        for use_scale in (True, False)
        for sub_sample in (False, True)
        for norm in (False, True)
    ),
    mmcv("embedded_gaussian", use_scale=True, sub_sample=False, norm=True, reduction=4),
    Pair(
        "danet-position",
        "danet",
        lambda c: official_code.PositionAttention(c, D),
        danet_position,
        "original",
    ),
    Pair("mmseg-position", "danet", lambda c: mmseg("PAM", c, D), danet_position, "mmseg"),
    Pair(
        "danet-channel",
        "danet",
        lambda c: official_code.ChannelAttention(),
        danet_channel,
        "original",
    ),
    Pair("mmseg-channel", "danet", lambda c: mmseg("CAM"), danet_channel, "mmseg"),
]
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, differentiable: bool) -> None:
    """Fail unless both give the same result, gradient of x and running statistics."""
    with torch.set_grad_enabled(differentiable):
        inputs = [x.clone().requires_grad_(differentiable) for _ in range(2)]
        results = [ours(inputs[0]), theirs(inputs[1])]
    tensors = [results]
    if differentiable:
        direction = image(*x.shape, seed=2)
        tensors.append(
            [torch.autograd.grad(y, x, direction)[0] for y, x in zip(results, inputs, strict=True)]
        )
    tensors += zip(
        *([b for n, b in m.named_buffers() if "running" in n] for m in (ours, theirs)), strict=True
    )
    for actual, expected in tensors:
        assert (actual - expected).abs().max() <= EXACT * expected.abs().max()


@each_pair
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_our_layer_with_their_weights_equals_theirs(pair: Pair, training: bool) -> None:
    pair.theirs(C)  # skips where their package is missing

    @settings(max_examples=3)
    @given(
        batch=st.integers(1, 3),
        channels=st.sampled_from([1, 4, 8, 11]),
        height=st.integers(2, 7),
        width=st.integers(2, 7),
        seed=st.integers(0, 99),
    )
    def check(batch: int, channels: int, height: int, width: int, seed: int) -> None:
        theirs = randomised(pair.theirs(channels), seed)
        ours = pair.ours(channels).double()
        ours.load_state_dict(convert(theirs.state_dict(), pair.source))
        x = image(batch, channels, height, width, seed=seed)
        assert_same(ours.train(training), theirs.train(training), x, pair.differentiable)

    check()


@each_pair
def test_round_trips_are_exact(pair: Pair) -> None:
    theirs = randomised(pair.theirs(C)).state_dict()
    ours = convert(theirs, pair.source)
    back = convert(ours, pair.source, reverse=True, variant=pair.variant)
    assert back.keys() == theirs.keys()
    for name, tensor in back.items():
        assert tensor.shape == theirs[name].shape, name
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@each_pair
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_their_layer_with_our_weights_equals_ours(pair: Pair, training: bool) -> None:
    # The output's bias, which mmcv lacks before a normalisation, is random here too.
    theirs, ours = pair.theirs(C).double(), randomised(pair.ours(C), 3)
    back = convert(ours.state_dict(), pair.source, reverse=True, variant=pair.variant)
    theirs.load_state_dict(back)
    x = image(2, C, 4, 5)
    with torch.no_grad():
        expected = ours.train(training)(x)
        assert (theirs.train(training)(x) - expected).abs().max() <= EXACT * expected.abs().max()


ALL_MAPPINGS = [
    pytest.param(source, mapping, id=f"{source}-{mapping.old}")
    for source, mappings in MAPPINGS.items()
    for mapping in mappings
]


def described(text: str) -> nn.Module:
    """Build the layer of a description."""
    names = {
        **vars(fullattn),
        "models": fullattn.segmentation.models,
        "nn": nn,
        "C": C,
        "D": D,
        "K": 5,
        "R": 4,
    }
    with torch.device("meta"):
        layer = eval(text, names)
    assert isinstance(layer, nn.Module)
    return layer


@pytest.mark.parametrize(("source", "mapping"), ALL_MAPPINGS)
def test_a_mapping_has_every_tensor_of_the_layer_that_it_names(
    source: Any, mapping: KeyMapping
) -> None:
    if source == "flanet":
        pytest.importorskip("timm", reason="timm is not installed", exc_type=Exception)
    layer = described(mapping.new)
    assert mapping.reversed().names() == mapping.mapped(set(layer.state_dict()))
    back = convert(layer.state_dict(), source, reverse=True, variant=mapping.variant)
    assert convert(back, source).keys() == layer.state_dict().keys()


def test_the_table_names_layers_and_options_that_exist() -> None:
    pytest.importorskip("timm", reason="timm is not installed", exc_type=Exception)
    layer = ""
    for line in table().splitlines():
        source, ours = line[:8].strip(), line[40:]
        assert not source or source in MAPPINGS
        if not ours.startswith(" "):
            layer = ours.partition("(")[0]
        described(f"{layer}(C, {ours.strip()})" if ours.startswith(" ") else ours)
    assert layer == "ChannelNonLocal"


# A prefix selects one layer of a model.


class Model(nn.Module):
    """Two attention layers of other projects, in a head, beside other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C))
        self.head = nn.Module()
        self.head.sa = official_code.PositionAttention(C, D)
        self.head.sc = official_code.ChannelAttention()


@pytest.mark.parametrize("prefix", ["head.sa", "head.sa."])
def test_a_prefix_selects_a_layer_with_or_without_the_last_dot(prefix: str) -> None:
    model = randomised(Model())
    layer = danet_position(C).double()
    layer.load_state_dict(convert(model.state_dict(), "danet", prefix=prefix))
    back = convert(layer.state_dict(), "danet", reverse=True, prefix=prefix)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in back.items())
    assert set(back) == {name for name in model.state_dict() if name.startswith("head.sa.")}


def test_prefixes_select_the_layers_of_a_real_head() -> None:
    networks.load("mmseg")
    from mmseg.models.decode_heads import DAHead

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = randomised(DAHead(pam_channels=D, in_channels=C, channels=C, num_classes=4)).eval()
    weights = {f"decode_head.{name}": tensor for name, tensor in head.state_dict().items()}
    x = image(2, C, 5, 6)
    for ours, theirs in ((danet_position(C), "pam"), (danet_channel(C), "cam")):
        ours.double().load_state_dict(convert(weights, "danet", prefix=f"decode_head.{theirs}"))
        assert_same(ours, getattr(head, theirs), x, differentiable=True)
    with pytest.raises(ValueError, match=r"at 'decode_head\.cam', 'decode_head\.pam': pass"):
        convert(weights, "danet")


# Inputs are not changed.


def test_tensors_are_shared_and_not_changed() -> None:
    theirs = randomised(official_code.FullyAttentionalBlock(C)).state_dict()
    before = copy.deepcopy(theirs)
    ours = convert(theirs, "flanet")
    assert ours["column_key.weight"].data_ptr() == theirs["conv1.weight"].data_ptr()
    assert theirs.keys() == before.keys()
    assert all(torch.equal(theirs[name], before[name]) for name in theirs)


def test_parameters_become_plain_tensors() -> None:
    parameters = dict(official_code.PositionAttention(C, D).named_parameters())
    for name, tensor in convert(parameters, "danet").items():
        assert type(tensor) is Tensor, name
        assert not tensor.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_and_dtype_are_kept(dtype: torch.dtype) -> None:
    layer = SpatialNonLocal(C, device="meta", dtype=dtype)
    back = convert(layer.state_dict(), "mmcv", reverse=True)
    for name, tensor in {**back, **convert(back, "mmcv")}.items():
        assert tensor.device.type == "meta", name
        assert tensor.dtype == (torch.int64 if "tracked" in name else dtype), name


def test_a_missing_batch_counter_is_0() -> None:
    old = randomised(official_code.FullyAttentionalBlock(C)).state_dict()
    del old["conv.1.num_batches_tracked"]
    layer = FullyAttentional(C).double()
    layer.load_state_dict(convert(old, "flanet"))
    assert layer.project.norm.num_batches_tracked == 0


def test_functions_and_errors_survive_pickle_and_deepcopy() -> None:
    for thing in (convert, load, table):
        assert pickle.loads(pickle.dumps(thing)) is thing
        assert copy.deepcopy(thing) is thing
    error = pickle.loads(pickle.dumps(CheckpointError("damaged")))
    assert (type(error), str(error)) == (CheckpointError, "damaged")
    assert copy.deepcopy(MAPPINGS) == MAPPINGS == pickle.loads(pickle.dumps(MAPPINGS))


# Bad state dicts.


def timm_weights() -> dict[str, Tensor]:
    layer = SpatialNonLocal(C, inner_channels=D)
    return convert(layer.state_dict(), "timm", reverse=True)


def refusal(*arguments: Any, error: type[Exception] = ValueError, **options: Any) -> str:
    """Return the error message of `convert`, after which a layer is unchanged."""
    layer = SpatialNonLocal(C, inner_channels=D)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error) as caught:
        layer.load_state_dict(convert(*arguments, **options))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", [n for n in timm_weights() if not n.endswith("tracked")])
def test_missing_keys_and_size_mismatches_are_named(name: str) -> None:
    weights = timm_weights()
    tensor = weights.pop(name)
    del weights["norm.num_batches_tracked"]  # which may be absent
    assert refusal(weights, "timm").endswith(
        f"closest layer NonLocalAttn(C): missing keys [{name!r}]"
    )
    for wrong in (tensor.new_zeros(5, *tensor.shape[1:]), tensor[None], tensor[0]):
        message = refusal({**weights, name: wrong}, "timm")
        mismatch = f"{name!r}: expected {tuple(tensor.shape)}, got {tuple(wrong.shape)}"
        assert message == (
            f"cannot convert from NonLocalAttn(C), C={C}, D={D}: size mismatch for {mismatch}"
        )


def test_at_most_ten_unexpected_keys_are_named() -> None:
    extra = {f"extra.{index:02}": torch.ones(1) for index in range(12)}
    few = dict(list(extra.items())[:2])
    assert refusal({**timm_weights(), **few}, "timm").endswith(
        "unexpected keys ['extra.00', 'extra.01']"
    )
    message = refusal({**timm_weights(), **extra}, "timm")
    assert message.endswith("'extra.08', 'extra.09'] and 2 others")


def test_names_in_errors_include_the_prefix() -> None:
    weights = {f"a.nl.{name}": tensor for name, tensor in timm_weights().items()}
    weights["a.nl.t.bias"] = torch.ones(1)
    assert "'a.nl.t.bias': expected (3,), got (1,)" in refusal(weights, "timm", prefix="a.nl")
    del weights["a.nl.t.bias"]
    assert refusal(weights, "timm", prefix="a.nl").endswith("missing keys ['a.nl.t.bias']")


def test_a_layer_with_additional_tensors_is_an_error() -> None:
    networks.load("mmseg")
    from mmseg.models.decode_heads.dnl_head import DisentangledNonLocal2d

    layer = DisentangledNonLocal2d(
        in_channels=C, reduction=2, use_scale=True, mode="embedded_gaussian", temperature=0.05
    )
    message = refusal(layer.state_dict(), "mmcv")
    assert message.endswith("unexpected keys ['conv_mask.bias', 'conv_mask.weight']")


@pytest.mark.parametrize(
    ("weights", "source", "reverse", "message"),
    [
        (timm_weights(), "mmcv", False, "NonLocalAttn(C): expected source='timm', reverse=False"),
        (timm_weights(), "timm", True, "NonLocalAttn(C): expected source='timm', reverse=False"),
        (
            FullyAttentional(C).state_dict(),
            "flanet",
            False,
            "FullyAttentional(C): expected source='flanet', reverse=True",
        ),
        (
            SpatialNonLocal(C, project=False).state_dict(),
            "mmcv",
            True,
            "SpatialNonLocal(C, project=False): expected source='danet', reverse=True",
        ),
    ],
)
def test_a_layer_of_another_source_is_named(
    weights: dict[str, Tensor], source: Any, reverse: bool, message: str
) -> None:
    told = refusal(weights, source, reverse=reverse)
    assert told == f"these are the keys of {message}, got {source=}, {reverse=}"


def test_the_error_for_a_whole_model_names_the_prefixes_of_its_layers() -> None:
    weights = randomised(Model()).state_dict()
    places = "such a layer is at 'head.sa', 'head.sc': pass one as prefix"
    assert refusal(weights, "danet").endswith(places)
    message = refusal(weights, "danet", prefix="head.pam")
    assert message == f"no key begins with prefix 'head.pam.'; {places}"
    assert refusal(weights, "timm", prefix="tail") == "no key begins with prefix 'tail.'"
    assert refusal({}, "timm") == "the state dict is empty"
    ours = nn.Sequential(nn.Conv2d(3, C, 1), SpatialNonLocal(C, project=False)).state_dict()
    message = refusal(ours, "danet", reverse=True)
    assert message.endswith("such a layer is at '1': pass one of the layers")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (nn.Conv2d(1, 1, 1), "(names to tensors), got Conv2d"),
        (None, "(names to tensors), got NoneType"),
        ({**timm_weights(), "norm.eps": 1e-5}, "expected a tensor at 'norm.eps', got float"),
        ({**timm_weights(), "t.weight": None}, "expected a tensor at 't.weight', got NoneType"),
        ({0: torch.ones(1)}, "expected names in the state dict, got 0"),
    ],
)
def test_wrong_types_are_type_errors(weights: Any, message: str) -> None:
    assert message in refusal(weights, "timm", error=TypeError)


def test_values_outside_the_prefix_are_ignored() -> None:
    weights = {"sc.gamma": torch.ones(1), "meta": {"epoch": 3}}
    assert convert(weights, "danet", prefix="sc").keys() == {"gamma"}  # type: ignore[arg-type]


def test_the_error_for_an_unknown_source_or_variant_lists_the_known_ones() -> None:
    ours = SpatialNonLocal(C, inner_channels=D).state_dict()
    assert "'flanet', 'timm', 'mmcv', 'danet', got 'mmseg'" in refusal(ours, "mmseg")
    message = refusal(ours, "mmcv", reverse=True, variant="half")
    assert message == "variant must be one of None, 'plain', 'sub_sample', got 'half'"
    assert "variants of 'timm' are []" in refusal(ours, "timm", reverse=True, variant="plain")
    message = refusal(timm_weights(), "mmcv", variant="plain")
    assert message.startswith("expected variant only with reverse=True")
    assert message.endswith(
        "got variant='plain'; the variants of 'mmcv' are ['plain', 'sub_sample']"
    )


# Files.

WEIGHTS = {"gamma": torch.tensor([0.5]), "value.weight": torch.arange(6.0).reshape(2, 3)}


def assert_weights(found: dict[str, Tensor]) -> None:
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, WEIGHTS[name])
        assert tensor.device.type == "cpu"


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def safetensors_file() -> bytes:
    save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save
    content: bytes = save(WEIGHTS)
    return content


LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS: dict[str, Callable[[], bytes]] = {
    "zip": lambda: saved(WEIGHTS),
    "legacy": lambda: saved(WEIGHTS, **LEGACY),
    "safetensors": safetensors_file,
}
each_format = pytest.mark.parametrize("made", FORMATS.values(), ids=FORMATS)


@each_format
@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights", "weights.safetensors"])
def test_the_format_is_detected_from_the_contents(
    tmp_path: Path, name: str, made: Callable[[], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(made())
    assert_weights(load(path))
    assert_weights(load(str(path)))


@pytest.mark.parametrize(
    "wrapper",
    ["state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights"],
)
def test_weights_are_found_under_common_keys(tmp_path: Path, wrapper: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(saved({"epoch": 3, "optimizer": {"lr": 0.1}, wrapper: WEIGHTS}))
    assert_weights(load(path))


def refused(path: Path, content: bytes | None = None) -> str:
    """Return the error message of `load`."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


class System(Harmful):
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("harmful", [Harmful, System])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_file_is_named_and_never_run(
    tmp_path: Path, harmful: type[Harmful], options: dict[str, Any], nested: bool
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pt"
    code = harmful(trace)
    content = {**WEIGHTS, "epoch": code} if nested else code
    told = refused(path, saved(content, **options))
    assert f"cannot load {path}: it needs " in told
    assert "pathlib" in told or "system" in told or "getattr" in told
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_never_run(tmp_path: Path, protocol: int) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pt"
    for harmful in (Harmful(trace), System(trace)):
        refused(path, pickle.dumps(harmful, protocol))
        assert not trace.exists()
    refused(path, pickle.dumps({"gamma": 0.5}, protocol))


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_another_pickle_protocol_is_an_error(
    tmp_path: Path, protocol: int, options: dict[str, Any]
) -> None:
    content = saved(WEIGHTS, pickle_protocol=protocol, **options)
    told = refused(tmp_path / "weights.pt", content)
    assert "expected pickle protocol 2, the default of torch.save" in told
    assert told.endswith(f"got a file that begins with {bytes([0x80, protocol])!r}")


def test_the_error_names_the_classes_of_pickled_objects(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    assert "needs torch.nn.modules.conv.Conv2d" in refused(path, saved(nn.Conv2d(1, 1, 1)))
    numpy = pytest.importorskip("numpy")
    assert "needs numpy." in refused(path, saved({**WEIGHTS, "best": numpy.float64(0.5)}))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.trace(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2)).save(path)
    assert "a TorchScript archive contains code" in refused(path)


@each_format
def test_truncated_files_are_errors(tmp_path: Path, made: Callable[[], bytes]) -> None:
    content = made()
    for part in [*range(1, 40), *range(40, len(content), 61), len(content) - 1]:
        refused(tmp_path / "weights.pt", content[:part])


@each_format
@settings(max_examples=40)
@given(place=st.integers(0, 599), changed=st.integers(1, 255))
def test_a_damaged_file_is_an_error_or_contains_tensors(
    made: Callable[[], bytes], place: int, changed: int
) -> None:
    damaged = bytearray(made())
    damaged[place % len(damaged)] ^= changed
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights"
        path.write_bytes(damaged)
        try:
            found = load(path)
        except CheckpointError:
            return
    assert all(isinstance(tensor, Tensor) for tensor in found.values())


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"h", "is not a checkpoint"),
        (b"<!DOCTYPE html><html>Not found</html>", "is not a checkpoint"),
        (b'{"gamma": [0.5], "value": 3}', "is not a checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is not a checkpoint"),
        (bytes(1000), "is not a checkpoint"),
        (zipped(readme=b"hello"), "is not a checkpoint: a zip archive"),
        (zipped(**{"a/data.pkl": b""}), "expected pickle protocol 2"),
        (saved(torch.ones(3)), "holds no state dict but a Tensor"),
        (saved([torch.ones(3)]), "holds no state dict but a list"),
        (saved({}), "holds no tensors"),
        (saved({"model": {}}), "holds no tensors"),
        (saved({**WEIGHTS, "epoch": 3}), "got 'epoch' with a int"),
        (saved({3: torch.ones(1)}), "got 3 with a Tensor"),
        (saved({"model": {"layers": WEIGHTS}}), "got 'layers' with a dict"),
    ],
)
def test_other_files_are_errors(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path / "weights.pt", content)


def test_a_directory_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load(tmp_path / "nowhere.pt")


def test_the_error_without_safetensors_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors_file())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'fullattn\[checkpoints\]'"):
        load(path)


def test_a_checkpoint_goes_from_file_to_layer(tmp_path: Path) -> None:
    model, path = randomised(Model()), tmp_path / "danet.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    layer = danet_position(C).double()
    layer.load_state_dict(convert(load(path), "danet", prefix="head.sa"))
    x = image(2, C, 5, 6)
    assert_same(layer, model.head.sa, x, differentiable=True)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (
            SpatialNonLocal,
            {"channels": 16, "inner_channels": D},
            r"'key.weight': layer \(3, 16, 1, 1\), checkpoint \(3, 8, 1, 1\)",
        ),
        (
            SpatialNonLocal,
            {"inner_channels": D + 2},
            r"cannot load into SpatialNonLocal\(8, inner_channels=5",
        ),
        (
            SpatialNonLocal,
            {"inner_channels": D, "norm_layer": None},
            r"unexpected keys \['output.norm.bias'",
        ),
        (SpatialNonLocal, {"inner_channels": C, "project": False}, r"missing keys \['gamma'\]"),
        (FullyAttentional, {}, r"missing keys \['column_key.bias'"),
    ],
    ids=["other C", "other D", "no norm", "other form", "other layer"],
)
def test_weights_that_do_not_fit_leave_the_layer_unchanged(
    layer: Callable[..., nn.Module], options: dict[str, Any], message: str
) -> None:
    module = layer(**{"channels": C, **options})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_into(module, timm_weights(), "timm")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_load_into_accepts_a_prefix() -> None:
    module = SpatialNonLocal(C, inner_channels=D).double()
    weights = timm_weights()
    load_into(module, {f"neck.{k}": v for k, v in weights.items()}, "timm", prefix="neck")
    expected = convert(weights, "timm")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
