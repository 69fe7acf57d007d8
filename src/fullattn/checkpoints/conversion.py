"""Convert the state dict of one layer from another project's names and shapes to ours and back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Set
from itertools import product

import torch
from torch import Tensor, nn

from fullattn.checkpoints.mappings import MAPPINGS, KeyMapping, Source, SymbolicShape
from fullattn.layers import _checks

__all__ = ["convert", "load_into"]


def convert(
    state_dict: Mapping[str, Tensor],
    source: Source,
    *,
    reverse: bool = False,
    prefix: str = "",
    variant: str | None = None,
) -> dict[str, Tensor]:
    """Rename and reshape the tensors of a layer: theirs to ours, or with `reverse` ours to theirs.

    Every tensor is used. Tensors that the source lacks are created as zeros: the batch counters of
    old files, and the bias of our output convolution, which mmcv's lacks before a normalisation. In
    reverse, that bias is subtracted from the normalisation's running mean, which gives the same
    results in training and evaluation. A round trip is exact.

    Args:
        state_dict: of their layer, or of a model that contains it; in reverse, of one of our
            layers. It is not changed.
        source: whose layer it is. "danet" is the authors' code and mmsegmentation's.
        reverse: convert our tensors to theirs.
        prefix: name of their layer in their model, with or without the last dot. Other tensors are
            ignored; in reverse, the names of the result begin with it.
        variant: in reverse, which of theirs if several correspond to our layer: "plain" or
            "sub_sample" for "mmcv", "original" or "mmseg" for "danet"; None for the first of them.

    Returns:
        The state dict for our layer, in reverse for theirs. A tensor that was only renamed or
        reshaped shares its memory with the given one.

    Raises:
        TypeError: not a state dict, or it contains something other than a tensor.
        ValueError: missing or unexpected keys, a size mismatch, an unknown source or variant. The
            message names the keys and, if found, the layer and its prefix.

    Example:
        >>> import torch, fullattn
        >>> weights = {"head.sa.gamma": torch.tensor([2.0]), "head.sc.gamma": torch.tensor([0.5])}
        >>> layer = fullattn.ChannelNonLocal(8, least_similar=True)
        >>> layer.load_state_dict(convert(weights, "danet", prefix="head.sc"))
        <All keys matched successfully>
        >>> convert(layer.state_dict(), "danet", reverse=True, prefix="decode_head.cam")
        {'decode_head.cam.gamma': tensor([0.5000])}
    """
    _checks.option(source, "source", tuple(MAPPINGS))
    variants = tuple(dict.fromkeys(m.variant for m in MAPPINGS[source] if m.variant))
    if variant is not None and not (reverse and variants):
        raise ValueError(
            f"expected variant only with reverse=True and a source with variants, got {variant=}; "
            f"the variants of {source!r} are {list(variants)}"
        )
    _checks.option(variant, "variant", (None, *variants))
    prefix = f"{prefix.removesuffix('.')}." if prefix else ""
    before, after = ("", prefix) if reverse else (prefix, "")
    tensors = _below(before, state_dict)
    fitting = [m for m in _mappings(source, reverse) if m.fits(tensors.keys())]
    if not fitting:
        raise ValueError(_explain(state_dict, tensors.keys(), source, reverse, before))
    mapping = next(m for m in fitting if variant in (None, m.variant))
    sizes = _infer_sizes(mapping, tensors, before)
    return {after + name: x for name, x in _converted(mapping, tensors, sizes).items()}


def load_into(
    layer: nn.Module, state_dict: Mapping[str, Tensor], source: Source, *, prefix: str = ""
) -> None:
    """Load another project's weights into one of our layers, all of them or none.

    Equivalent to `layer.load_state_dict(convert(state_dict, source, prefix=prefix))`, but all names
    and shapes are checked before the first tensor is copied.

    Args:
        layer: one of this package's layers, with the options that `table()` lists.
        state_dict: as in `convert`.
        source: as in `convert`.
        prefix: as in `convert`.

    Raises:
        TypeError: as in `convert`.
        ValueError: as in `convert`, or the layer has other tensors; the layer is then unchanged.

    Example:
        >>> import torch, fullattn
        >>> layer = fullattn.ChannelNonLocal(8, least_similar=True)
        >>> load_into(layer, {"sc.gamma": torch.tensor([0.5])}, "danet", prefix="sc")
        >>> layer.gamma.item()
        0.5
    """
    converted = convert(state_dict, source, prefix=prefix)
    own = layer.state_dict()
    reasons = _key_errors(own.keys() - converted.keys(), converted.keys() - own.keys())
    reasons += [
        f"size mismatch for {name!r}: layer {tuple(own[name].shape)}, checkpoint {tuple(x.shape)}"
        for name, x in converted.items()
        if name in own and own[name].shape != x.shape
    ][:10]
    if reasons:
        described = f"{type(layer).__name__}({layer.extra_repr()})"
        raise ValueError(f"cannot load into {described}: {'; '.join(reasons)}")
    layer.load_state_dict(converted)


def _mappings(source: Source, reverse: bool) -> list[KeyMapping]:
    return [mapping.reversed() if reverse else mapping for mapping in MAPPINGS[source]]


def _below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names begin with a prefix, and remove the prefix."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"expected a state dict (names to tensors), got {type(state_dict).__name__}"
        )
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"expected names in the state dict, got {name!r}")
        if name.startswith(prefix) and not isinstance(tensor, Tensor):
            raise TypeError(f"expected a tensor at {name!r}, got {type(tensor).__name__}")
    return {n.removeprefix(prefix): x for n, x in state_dict.items() if n.startswith(prefix)}


def _explain(
    all_names: Collection[str], names: Set[str], source: Source, reverse: bool, prefix: str
) -> str:
    """Explain why no mapping fits."""
    for other, back in product(MAPPINGS, (False, True)):
        for mapping in _mappings(other, back):
            if mapping.fits(names):
                return (
                    f"these are the keys of {mapping.old}: expected source={other!r}, "
                    f"reverse={back}, got {source=}, {reverse=}"
                )
    mappings = _mappings(source, reverse)
    if names:
        closest = min(mappings, key=lambda m: len(m.names() ^ m.mapped(names)))
        unexpected = closest.mapped(names) - closest.names()
        errors = "; ".join(_key_errors(closest.required() - names, unexpected, prefix))
        reason = f"cannot convert from source {source!r}, closest layer {closest.old}: {errors}"
    elif all_names:
        reason = f"no key begins with prefix {prefix!r}"
    else:
        reason = "the state dict is empty"
    if found := _find_layers(all_names, mappings):
        hint = "pass one of the layers" if reverse else "pass one as prefix"
        reason += f"; such a layer is at {', '.join(map(repr, found[:10]))}: {hint}"
    return reason


def _find_layers(names: Collection[str], mappings: list[KeyMapping]) -> list[str]:
    """Find the prefixes of layers that a mapping fits."""
    prefixes = {name[: end + 1] for name in names for end, sign in enumerate(name) if sign == "."}
    below = {p: {n.removeprefix(p) for n in names if n.startswith(p)} for p in prefixes}
    return sorted(p[:-1] for p, inside in below.items() if any(m.fits(inside) for m in mappings))


def _key_errors(missing: Set[str], unexpected: Set[str], prefix: str = "") -> list[str]:
    """Name at most ten keys of each kind."""
    return [
        f"{kind} keys {[prefix + name for name in sorted(names)[:10]]}"
        + (f" and {len(names) - 10} others" if len(names) > 10 else "")
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]


def _infer_sizes(mapping: KeyMapping, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, int]:
    """Infer C, D, ... by majority, and check all shapes against them."""
    keys = [key for key in mapping.keys if key.old in tensors]
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for key in keys:
        for size, actual in zip(key.old_shape, tensors[key.old].shape, strict=False):
            if isinstance(size, str):
                votes[size[-1]][actual // int(size[:-1] or 1)] += 1
    sizes = {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}
    wrong = [
        f"size mismatch for {prefix + key.old!r}: expected {expected}, got {given}"
        for key in keys
        if (expected := _evaluate(key.old_shape, sizes)) != (given := tuple(tensors[key.old].shape))
    ]
    if wrong:
        known = "".join(f", {symbol}={size}" for symbol, size in sorted(sizes.items()))
        raise ValueError(f"cannot convert from {mapping.old}{known}: {'; '.join(wrong)}")
    return sizes


def _evaluate(shape: SymbolicShape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(
        size if isinstance(size, int) else int(size[:-1] or 1) * sizes.get(size[-1], 1)
        for size in shape
    )


def _converted(
    mapping: KeyMapping, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    tensors = {name: x.detach() for name, x in tensors.items()}
    weight = tensors[mapping.keys[0].old]
    for key in mapping.keys:
        if key.old and not key.new:  # a convolution's bias, absorbed by the normalisation's mean
            mean = key.old.replace("conv.bias", "norm.running_mean")
            tensors[mean] = tensors[mean] - tensors[key.old]
    converted = {name: x for name, x in tensors.items() if name.startswith(mapping.kept)}
    for name in [name for name in converted if name.endswith(".running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        converted.setdefault(counter, weight.new_zeros((), dtype=torch.long))
    for key in mapping.keys:
        if key.new:
            shape = _evaluate(key.new_shape, sizes)
            dtype = torch.long if key.is_counter else weight.dtype
            tensor = (
                tensors[key.old] if key.old in tensors else weight.new_zeros(shape, dtype=dtype)
            )
            converted[key.new] = tensor.reshape(shape)
    return converted
