"""Which tensors other projects' layers have, what they are called and how they lie: data alone."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

__all__ = ["FORMS", "Form", "Key", "Shape", "Source", "table"]

Source = Literal["flanet", "timm", "mmcv", "danet"]

# C is the layer's channels, D those of its queries; "2D" is twice D.
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Key:
    """One tensor before and after a conversion.

    Attributes:
        old: its name before; empty where it is not there, which makes it 0 after.
        new: its name after; empty where it is not there.
        shape: its shape before.
        other_shape: its shape after, where it is another.
        counter: whether it counts batches, which old files leave out.
        folded_into: where this is a bias that may have no name after, the old name of the running
            mean from which it is taken instead.
    """

    old: str
    new: str
    shape: Shape
    other_shape: Shape | None = None
    counter: bool = False
    folded_into: str = ""

    @property
    def new_shape(self) -> Shape:
        """Its shape after."""
        return self.shape if self.other_shape is None else self.other_shape

    def reversed(self) -> Key:
        """The same tensor in the conversion back."""
        return replace(
            self, old=self.new, new=self.old, shape=self.new_shape, other_shape=self.shape
        )


@dataclass(frozen=True)
class Form:
    """A layer before and after a conversion, with all of its tensors.

    Attributes:
        old: what the layer is before.
        new: what it is after.
        keys: its tensors; the first has a name on both sides.
        variant: name among the forms of the source that are one layer here.
        kept: where this is a whole network, the prefix below which tensors keep their names.
    """

    old: str
    new: str
    keys: tuple[Key, ...]
    variant: str | None = None
    kept: str = ""

    def reversed(self) -> Form:
        """The conversion back."""
        keys = tuple(key.reversed() for key in self.keys)
        return replace(self, old=self.new, new=self.old, keys=keys)

    def names(self) -> set[str]:
        """Names of all tensors before the conversion."""
        return {key.old for key in self.keys if key.old}

    def needed(self) -> set[str]:
        """The same without those that old files leave out."""
        return self.names() - {key.old for key in self.keys if key.counter}

    def keeps(self, name: str) -> bool:
        """Whether a tensor is one that keeps its name."""
        return bool(self.kept) and name.startswith(self.kept)

    def own(self, names: Set[str]) -> set[str]:
        """The names among these that do not keep theirs."""
        return {name for name in names if not self.keeps(name)}

    def fits(self, names: Set[str]) -> bool:
        """Whether these are the names before the conversion, no fewer and no more."""
        own = self.own(names)
        return self.needed() <= own <= self.names() and bool(self.kept) == (own != names)


def _affine(theirs: str, ours: str, *shape: int | str) -> tuple[Key, ...]:
    """Weight and bias of a Linear or a convolution."""
    return (
        Key(f"{theirs}.weight", f"{ours}.weight", shape),
        Key(f"{theirs}.bias", f"{ours}.bias", shape[:1]),
    )


def _batch_norm(theirs: str, ours: str, width: int | str = "C") -> tuple[Key, ...]:
    names = ("weight", "bias", "running_mean", "running_var")
    counter = "num_batches_tracked"
    return (
        *(Key(f"{theirs}.{name}", f"{ours}.{name}", (width,)) for name in names),
        Key(f"{theirs}.{counter}", f"{ours}.{counter}", (), counter=True),
    )


_FLANET = Form(
    "FullyAttentionalBlock(C)",
    "FullyAttentional(C)",
    (
        *_affine("conv1", "column_key", "C", "C"),
        *_affine("conv2", "row_key", "C", "C"),
        Key("conv.0.weight", "project.conv.weight", ("C", "C", 3, 3)),
        *_batch_norm("conv.1", "project.norm"),
        Key("gamma", "gamma", (1,)),
    ),
)


def _flanet_convolution(theirs: str, ours: str, norm: str, *shape: int | str) -> tuple[Key, ...]:
    return (
        Key(f"{theirs}.weight", f"{ours}.conv.weight", (*shape, 3, 3)),
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
# output's convolution, A of the auxiliary heads'; S is L + C.
_FLANET_NETWORK = Form(
    "FLANet(..., n_classes=K)",
    "models.FLANet(K)",
    (
        Key("fully.gamma", "head.attention.gamma", (1,)),
        *_affine("fully.conv1", "head.attention.column_key", "C", "C"),
        *_affine("fully.conv2", "head.attention.row_key", "C", "C"),
        *_flanet_convolution("fully.conv.0", "head.project", "fully.conv.1", "C", "C"),
        *_flanet_convolution("conv.0", "head.reduce.0", "conv.1", "C", "L"),
        *_flanet_convolution("conv.3", "head.reduce.1", "conv.4", "C", "C"),
        *_flanet_output("conv_out1", "head.output", "O", "S"),
        *_flanet_output("conv_out2", "auxiliary.0", "A", "N"),
        *_flanet_output("conv_out3", "auxiliary.1", "A", "M"),
    ),
    kept="backbone.",
)

_TIMM = Form(
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


def _mmcv(mode: str | None, normalised: bool, pooled: bool) -> Form:
    theirs, ours = ["C"], ["C"]
    pool = ".0" if pooled else ""  # the pooling is the convolution's neighbour in a Sequential
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
        keys.append(Key("conv_out.conv.weight", "output.conv.weight", ("C", "D", 1, 1)))
        mean = "output.norm.running_mean"
        keys.append(Key("", "output.conv.bias", ("C",), folded_into=mean))
        keys += _batch_norm("conv_out.bn", "output.norm")
    else:
        ours.append("norm_layer=None")
        keys += _affine("conv_out.conv", "output.conv", "C", "D", 1, 1)
    return Form(
        f"NonLocal2d({', '.join(theirs)})",
        f"SpatialNonLocal({', '.join(ours)})",
        tuple(keys),
        variant="sub_sample" if pooled else "plain",
    )


def _danet_position(variant: str, suffix: str, gamma: str, gamma_shape: Shape) -> Form:
    return Form(
        f"position attention ({variant})",
        "SpatialNonLocal(C, project=False)",
        (
            *_affine(f"query_{suffix}", "query", "D", "C", 1, 1),
            *_affine(f"key_{suffix}", "key", "D", "C", 1, 1),
            *_affine(f"value_{suffix}", "value", "C", "C", 1, 1),
            Key(gamma, "gamma", gamma_shape, (1,)),
        ),
        variant,
    )


def _danet_channel(variant: str, gamma: str, gamma_shape: Shape) -> Form:
    return Form(
        f"channel attention ({variant})",
        "ChannelNonLocal(C, least_similar=True)",
        (Key(gamma, "gamma", gamma_shape, (1,)),),
        variant,
    )


# Where several forms are one layer here, the first is the one that reverse conversion makes.
FORMS: dict[Source, tuple[Form, ...]] = {
    "flanet": (_FLANET, _FLANET_NETWORK),
    "timm": (_TIMM,),
    "mmcv": tuple(
        _mmcv(mode, normalised, pooled)
        # Mode dot_product has the tensors of the default mode.
        for mode, normalised, pooled in product(
            (None, "gaussian", "concatenation"), (False, True), (False, True)
        )
    ),
    "danet": (
        _danet_position("original", "conv", "gamma", (1,)),
        _danet_position("mmseg", "project", "gamma.scale", ()),
        _danet_channel("original", "gamma", (1,)),
        _danet_channel("mmseg", "gamma.scale", ()),
    ),
}

# An indented row is an option of the layer above it.
_TABLE: dict[Source, tuple[tuple[str, str], ...]] = {
    "flanet": (
        ("FullyAttentionalBlock(C)", "FullyAttentional(C)"),
        ("  batches as it saw them", "  mix_images=True"),
        ("FLANet(..., n_classes=K)", "models.FLANet(K)"),
        ("  deep_stem=False", "  backbone='resnet101'"),
    ),
    "timm": (
        (
            "NonLocalAttn(C, rd_channels=D)",
            "SpatialNonLocal(C, inner_channels=D, scale=C**-0.5)",
        ),
        ("  use_scale=False", "  scale=1.0"),
    ),
    "mmcv": (
        ("NonLocal2d(C)", "SpatialNonLocal(C, scale=None, norm_layer=None)"),
        ("  use_scale=False", "  scale=1.0"),
        ("  reduction=R", "  inner_channels=C//R"),
        ("  mode='gaussian'", "  mode='gaussian', scale=1.0"),
        ("  mode='dot_product'", "  mode='dot_product', scale=1.0"),
        ("  mode='concatenation'", "  mode='concatenation'"),
        ("  sub_sample=True", "  subsample=2"),
        ("  norm_cfg=dict(type='BN')", "  norm_layer=nn.BatchNorm2d"),
    ),
    "danet": (
        ("PAM_Module(C)", "SpatialNonLocal(C, inner_channels=C//8, project=False)"),
        ("mmseg's PAM(C, D)", "SpatialNonLocal(C, inner_channels=D, project=False)"),
        ("CAM_Module(C), mmseg's CAM()", "ChannelNonLocal(C, least_similar=True)"),
    ),
}


def table() -> str:
    """Which of our layers, with which options, takes the weights of which layer.

    Returns:
        A line each: the source where it changes, their layer or option, ours.

    Example:
        >>> print(table().splitlines()[4])
        timm    NonLocalAttn(C, rd_channels=D)  SpatialNonLocal(C, inner_channels=D, scale=C**-0.5)
    """
    width = max(len(theirs) for rows in _TABLE.values() for theirs, _ in rows)
    return "\n".join(
        f"{'' if index else source:<8}{theirs:<{width}}  {ours}"
        for source, rows in _TABLE.items()
        for index, (theirs, ours) in enumerate(rows)
    )
