"""Names and shapes of the tensors of other projects' layers, and their names and shapes in ours."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

__all__ = ["MAPPINGS", "Key", "KeyMapping", "Source", "SymbolicShape", "table"]

Source = Literal["flanet", "timm", "mmcv", "danet"]

# C is the layer's number of channels, D that of its queries; "2D" is twice D.
SymbolicShape = tuple[int | str, ...]


@dataclass(frozen=True)
class Key:
    """One tensor before and after a conversion.

    Attributes:
        old: its name before; empty if it does not exist there, and is then created as 0.
        new: its name after; empty if it does not exist there.
        old_shape: its shape before.
        new_shape: its shape after.
    """

    old: str
    new: str
    old_shape: SymbolicShape
    new_shape: SymbolicShape

    @property
    def is_counter(self) -> bool:
        """Whether it counts batches. Old files lack such tensors."""
        return self.old.endswith("num_batches_tracked")


@dataclass(frozen=True)
class KeyMapping:
    """A layer before and after a conversion, with all of its tensors.

    Attributes:
        old: the layer before.
        new: the layer after.
        keys: its tensors; the first exists on both sides.
        variant: which of several layers of the source correspond to one of ours.
        kept: for a whole network, prefixes of the tensors that keep their names.
    """

    old: str
    new: str
    keys: tuple[Key, ...]
    variant: str | None = None
    kept: tuple[str, ...] = ()

    def reversed(self) -> KeyMapping:
        """Return the mapping of the opposite conversion."""
        keys = tuple(Key(k.new, k.old, k.new_shape, k.old_shape) for k in self.keys)
        return replace(self, old=self.new, new=self.old, keys=keys)

    def names(self) -> set[str]:
        """Return the names of all mapped tensors before the conversion."""
        return {key.old for key in self.keys if key.old}

    def required(self) -> set[str]:
        """Return the names that every checkpoint has."""
        return {key.old for key in self.keys if key.old and not key.is_counter}

    def mapped(self, names: Set[str]) -> set[str]:
        """Return those of the names that are not kept."""
        return {name for name in names if not name.startswith(self.kept)}

    def fits(self, names: Set[str]) -> bool:
        """Return whether these are the names before the conversion, all and no others."""
        mapped = self.mapped(names)
        return self.required() <= mapped <= self.names() and bool(self.kept) == (mapped != names)


def _key(theirs: str, ours: str, *shape: int | str) -> Key:
    return Key(theirs, ours, shape, shape)


def _affine(theirs: str, ours: str, *shape: int | str) -> tuple[Key, ...]:
    """Map weight and bias of a Linear or a convolution."""
    return (
        _key(f"{theirs}.weight", f"{ours}.weight", *shape),
        _key(f"{theirs}.bias", f"{ours}.bias", *shape[:1]),
    )


def _batch_norm(theirs: str, ours: str, width: int | str = "C") -> tuple[Key, ...]:
    names = ("weight", "bias", "running_mean", "running_var")
    counter = "num_batches_tracked"
    return (
        *(_key(f"{theirs}.{name}", f"{ours}.{name}", width) for name in names),
        _key(f"{theirs}.{counter}", f"{ours}.{counter}"),
    )


_FLANET = KeyMapping(
    "FullyAttentionalBlock(C)",
    "FullyAttentional(C)",
    (
        *_affine("conv1", "column_key", "C", "C"),
        *_affine("conv2", "row_key", "C", "C"),
        _key("conv.0.weight", "project.conv.weight", "C", "C", 3, 3),
        *_batch_norm("conv.1", "project.norm"),
        _key("gamma", "gamma", 1),
    ),
)


def _flanet_convolution(theirs: str, ours: str, norm: str, *shape: int | str) -> tuple[Key, ...]:
    return (
        _key(f"{theirs}.weight", f"{ours}.conv.weight", *shape, 3, 3),
        *_batch_norm(norm, f"{ours}.norm", shape[0]),
    )


def _flanet_output(theirs: str, ours: str, width: str, in_width: str) -> tuple[Key, ...]:
    return (
        *_flanet_convolution(
            f"{theirs}.conv.1", f"{ours}.reduce", f"{theirs}.conv.2", width, in_width
        ),
        *_affine(f"{theirs}.conv.5", f"{ours}.classifier", "K", width, 1, 1),
    )


# The backbone has timm's names in both. Widths: L, M and N of the backbone's last stages, O of the
# output's convolution, A of the auxiliary heads' convolutions; S is L + C.
_FLANET_NETWORK = KeyMapping(
    "FLANet(..., n_classes=K)",
    "models.FLANet(K)",
    (
        _key("fully.gamma", "head.attention.gamma", 1),
        *_affine("fully.conv1", "head.attention.column_key", "C", "C"),
        *_affine("fully.conv2", "head.attention.row_key", "C", "C"),
        *_flanet_convolution("fully.conv.0", "head.project", "fully.conv.1", "C", "C"),
        *_flanet_convolution("conv.0", "head.reduce.0", "conv.1", "C", "L"),
        *_flanet_convolution("conv.3", "head.reduce.1", "conv.4", "C", "C"),
        *_flanet_output("conv_out1", "head.output", "O", "S"),
        *_flanet_output("conv_out2", "auxiliary.0", "A", "N"),
        *_flanet_output("conv_out3", "auxiliary.1", "A", "M"),
    ),
    kept=("backbone.",),
)

_TIMM = KeyMapping(
    "NonLocalAttn(C)",
    "SpatialNonLocal(C)",
    (
        *_affine("t", "query", "D", "C", 1, 1),
        *_affine("p", "key", "D", "C", 1, 1),
        *_affine("g", "value", "D", "C", 1, 1),
        *_affine("z", "output.conv", "C", "D", 1, 1),
        *_batch_norm("norm", "output.norm"),
    ),
)


def _mmcv(mode: str | None, normalised: bool, pooled: bool) -> KeyMapping:
    theirs, ours = ["C"], ["C"]
    pool = ".0" if pooled else ""  # the convolution is followed by its pooling in a Sequential
    keys = list(_affine(f"g{pool}.conv", "value", "D", "C", 1, 1))
    if mode is not None:
        theirs.append(f"mode={mode!r}")
        ours.append(f"mode={mode!r}")
    if mode != "gaussian":
        keys += _affine("theta.conv", "query", "D", "C", 1, 1)
        keys += _affine(f"phi{pool}.conv", "key", "D", "C", 1, 1)
    if mode == "concatenation":
        keys.append(Key("concat_project.conv.weight", "score.weight", (1, "2D", 1, 1), (1, "2D")))
    if pooled:
        theirs.append("sub_sample=True")
        ours.append("subsample=2")
    if normalised:
        theirs.append("norm_cfg=dict(type='BN')")
        keys.append(_key("conv_out.conv.weight", "output.conv.weight", "C", "D", 1, 1))
        keys.append(_key("", "output.conv.bias", "C"))
        keys += _batch_norm("conv_out.bn", "output.norm")
    else:
        ours.append("norm_layer=None")
        keys += _affine("conv_out.conv", "output.conv", "C", "D", 1, 1)
    return KeyMapping(
        f"NonLocal2d({', '.join(theirs)})",
        f"SpatialNonLocal({', '.join(ours)})",
        tuple(keys),
        variant="sub_sample" if pooled else "plain",
    )


# Variant, suffix of the convolutions' names, name and shape of gamma.
_DANET: tuple[tuple[str, str, str, SymbolicShape], ...] = (
    ("original", "conv", "gamma", (1,)),
    ("mmseg", "project", "gamma.scale", ()),
)
_DANET_POSITION = tuple(
    KeyMapping(
        f"position attention ({variant})",
        "SpatialNonLocal(C, project=False)",
        (
            *_affine(f"query_{suffix}", "query", "D", "C", 1, 1),
            *_affine(f"key_{suffix}", "key", "D", "C", 1, 1),
            *_affine(f"value_{suffix}", "value", "C", "C", 1, 1),
            Key(gamma, "gamma", shape, (1,)),
        ),
        variant,
    )
    for variant, suffix, gamma, shape in _DANET
)
_DANET_CHANNEL = tuple(
    KeyMapping(
        f"channel attention ({variant})",
        "ChannelNonLocal(C, least_similar=True)",
        (Key(gamma, "gamma", shape, (1,)),),
        variant,
    )
    for variant, _, gamma, shape in _DANET
)

# If several layers correspond to one of ours, reverse conversion returns the first by default.
MAPPINGS: dict[Source, tuple[KeyMapping, ...]] = {
    "flanet": (_FLANET, _FLANET_NETWORK),
    "timm": (_TIMM,),
    "mmcv": tuple(
        _mmcv(mode, normalised, pooled)
        # mode='dot_product' has the tensors of the default mode.
        for mode, normalised, pooled in product(
            (None, "gaussian", "concatenation"), (False, True), (False, True)
        )
    ),
    "danet": _DANET_POSITION + _DANET_CHANNEL,
}

# An indented row is an option of the layer above it.
_TABLE = """\
flanet  FullyAttentionalBlock(C)        FullyAttentional(C)
          trained at batch size > 1       mix_images=True
        FLANet(..., n_classes=K)        models.FLANet(K)
          deep_stem=False                 backbone='resnet101'
timm    NonLocalAttn(C, rd_channels=D)  SpatialNonLocal(C, inner_channels=D, scale=C**-0.5)
          use_scale=False                 scale=1.0
mmcv    NonLocal2d(C)                   SpatialNonLocal(C, scale=None, norm_layer=None)
          use_scale=False                 scale=1.0
          reduction=R                     inner_channels=C//R
          mode='gaussian'                 mode='gaussian', scale=1.0
          mode='dot_product'              mode='dot_product', scale=1.0
          mode='concatenation'            mode='concatenation'
          sub_sample=True                 subsample=2
          norm_cfg=dict(type='BN')        norm_layer=nn.BatchNorm2d
danet   PAM_Module(C)                   SpatialNonLocal(C, inner_channels=C//8, project=False)
        mmseg's PAM(C, D)               SpatialNonLocal(C, inner_channels=D, project=False)
        CAM_Module(C), mmseg's CAM()    ChannelNonLocal(C, least_similar=True)"""


def table() -> str:
    """List which of our layers, with which options, takes the weights of which other layer.

    Returns:
        Columns: the source, their layer or an option of it, ours. C is the number of channels.

    Example:
        >>> print(table().splitlines()[4])
        timm    NonLocalAttn(C, rd_channels=D)  SpatialNonLocal(C, inner_channels=D, scale=C**-0.5)
    """
    return _TABLE
