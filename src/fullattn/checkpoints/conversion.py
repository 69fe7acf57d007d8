"""The state dict of one layer, from another project's names and shapes to ours and back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Set

import torch
from torch import Tensor, nn

from fullattn.checkpoints.mappings import FORMS, Form, Shape, Source
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

    Every tensor is used, and none is made up but zeros: a count of batches that an old file leaves
    out, and the bias of our output convolution, which mmcv's lacks before a normalisation. In
    reverse the normalisation's running mean takes that bias, which gives the same results in
    training and in evaluation. There and back is the same to the bit.

    Args:
        state_dict: of their layer, or of a model that has it; in reverse of one of our layers. It
            is left as it is.
        source: whose layer it is. "danet" is the authors' code and mmsegmentation's.
        reverse: convert our tensors to theirs.
        prefix: where their layer is in their model, with or without the last dot. Only the tensors
            below it are looked at; in reverse the names of the result begin with it.
        variant: in reverse, which of theirs where several are one layer here: "plain" or
            "sub_sample" for "mmcv", "original" or "mmseg" for "danet"; None for the first of them.

    Returns:
        The state dict for our layer, in reverse for theirs. A tensor that was only renamed or
        reshaped shares its memory with the one given.

    Raises:
        TypeError: not a state dict, or not a tensor in it.
        ValueError: a missing tensor, one left over, a wrong shape, an unknown source or variant;
            the message names them, and says whose layer it is and where, if it knows.

    Example:
        >>> import torch, fullattn
        >>> weights = {"head.sa.gamma": torch.tensor([2.0]), "head.sc.gamma": torch.tensor([0.5])}
        >>> layer = fullattn.ChannelNonLocal(8, least_similar=True)
        >>> layer.load_state_dict(convert(weights, "danet", prefix="head.sc"))
        <All keys matched successfully>
        >>> convert(layer.state_dict(), "danet", reverse=True, prefix="decode_head.cam")
        {'decode_head.cam.gamma': tensor([0.5000])}
    """
    _checks.option(source, "source", tuple(FORMS))
    _check_variant(source, reverse, variant)
    prefix = f"{prefix.removesuffix('.')}." if prefix else ""
    before, after = ("", prefix) if reverse else (prefix, "")
    tensors = _below(before, state_dict)
    fitting = [form for form in _forms(source, reverse) if form.fits(tensors.keys())]
    if not fitting:
        raise ValueError(_why_none_fits(state_dict, tensors.keys(), source, reverse, before))
    form = next(form for form in fitting if variant in (None, form.variant))
    sizes = _sizes(form, tensors)
    _check_shapes(form, tensors, sizes, before)
    return {after + name: x for name, x in _converted(form, tensors, sizes).items()}


def load_into(
    layer: nn.Module, state_dict: Mapping[str, Tensor], source: Source, *, prefix: str = ""
) -> None:
    """Load another project's weights into one of our layers, all of them or none.

    The same as `layer.load_state_dict(convert(state_dict, source, prefix=prefix))`, except that
    names and shapes are compared before the first tensor is copied.

    Args:
        layer: one of this package's layers, with the options that `table()` names.
        state_dict: as in `convert`.
        source: as in `convert`.
        prefix: as in `convert`.

    Raises:
        TypeError: as in `convert`.
        ValueError: as in `convert`, or the layer has other tensors; it is then as it was.

    Example:
        >>> import torch, fullattn
        >>> layer = fullattn.ChannelNonLocal(8, least_similar=True)
        >>> load_into(layer, {"sc.gamma": torch.tensor([0.5])}, "danet", prefix="sc")
        >>> layer.gamma.item()
        0.5
    """
    converted = convert(state_dict, source, prefix=prefix)
    own = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    reasons = []
    if lacking := own.keys() - converted.keys():
        reasons.append(f"they lack {_listed(lacking)}")
    if left_over := converted.keys() - own.keys():
        reasons.append(f"it has no {_listed(left_over)}")
    reasons += [
        f"{name!r} is {own[name]} in it and {tuple(x.shape)} in them"
        for name, x in converted.items()
        if name in own and own[name] != tuple(x.shape)
    ][:10]
    if reasons:
        described = f"{type(layer).__name__}({layer.extra_repr()})"
        raise ValueError(f"these weights are not of {described}: {'; '.join(reasons)}")
    layer.load_state_dict(converted)


def _forms(source: Source, reverse: bool) -> list[Form]:
    return [form.reversed() if reverse else form for form in FORMS[source]]


def _check_variant(source: Source, reverse: bool, variant: str | None) -> None:
    variants = tuple(dict.fromkeys(form.variant for form in FORMS[source] if form.variant))
    if variant is not None and not (reverse and variants):
        raise ValueError(
            f"variant={variant!r} is for reverse=True and a source that has variants: "
            f"{source!r} has {_listed(variants) or 'none'}"
        )
    _checks.option(variant, "variant", (None, *variants))


def _below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"expected a state dict, from names to tensors, got {type(state_dict).__name__}"
        )
    tensors = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"expected names in the state dict, got {name!r}")
        if not name.startswith(prefix):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected a tensor at {name!r}, got {type(tensor).__name__}")
        tensors[name.removeprefix(prefix)] = tensor
    return tensors


def _why_none_fits(
    everything: Collection[str], names: Set[str], source: Source, reverse: bool, prefix: str
) -> str:
    others = [
        f"{form.old}: source={other!r}, reverse={back}"
        for other in FORMS
        for back in (False, True)
        for form in _forms(other, back)
        if form.fits(names)
    ]
    if others:
        return f"these are the keys of {others[0]}; got source={source!r}, reverse={reverse}"
    forms = _forms(source, reverse)
    if names:
        nearest = min(forms, key=lambda form: len(form.names() ^ form.own(names)))
        reason = f"these are not the keys of a layer of source {source!r}, nearest {nearest.old}"
        if missing := nearest.needed() - names:
            reason += f"; missing: {_listed(missing, prefix)}"
        if left_over := nearest.own(names) - nearest.names():
            reason += f"; left over: {_listed(left_over, prefix)}"
    elif everything:
        reason = f"no key begins with prefix {prefix!r}"
    else:
        reason = "the state dict is empty"
    if found := _found(everything, forms):
        where = "give one of the layers" if reverse else "give one as prefix"
        reason += f"; such a layer is at {_listed(found)}: {where}"
    return reason


def _found(names: Collection[str], forms: list[Form]) -> list[str]:
    """Prefixes below which there is a layer."""
    below: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            below[".".join(parts[:depth])].add(".".join(parts[depth:]))
    return [prefix for prefix, own in below.items() if any(form.fits(own) for form in forms)]


def _listed(names: Collection[str], prefix: str = "") -> str:
    """Ten of the names, and how many others there are."""
    shown = [prefix + name for name in sorted(names)[:10]]
    others = len(names) - len(shown)
    return ", ".join(map(repr, shown)) + (f" and {others} others" if others else "")


def _sizes(form: Form, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What C and D stand for: by majority, so that a wrong shape is told from the right ones."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for key in form.keys:
        if key.old in tensors:
            for size, actual in zip(key.shape, tensors[key.old].shape, strict=False):
                if isinstance(size, str):
                    factor, symbol = _factor_and_symbol(size)
                    votes[symbol][actual // factor] += 1
    return {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}


def _factor_and_symbol(size: str) -> tuple[int, str]:
    return int(size[:-1] or 1), size[-1]


def _filled(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    def filled(size: int | str) -> int:
        if isinstance(size, int):
            return size
        factor, symbol = _factor_and_symbol(size)
        return factor * sizes.get(symbol, 1)

    return tuple(map(filled, shape))


def _check_shapes(
    form: Form, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], prefix: str
) -> None:
    wrong = [
        f"{prefix + key.old!r} of shape {expected}, got {given}"
        for key in form.keys
        if key.old in tensors
        and (expected := _filled(key.shape, sizes)) != (given := tuple(tensors[key.old].shape))
    ]
    if wrong:
        known = "".join(f", {symbol}={size}" for symbol, size in sorted(sizes.items()))
        raise ValueError(f"{form.old}{known}: expected {'; '.join(wrong)}")


def _converted(
    form: Form, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    weight = tensors[form.keys[0].old]
    biases = {key.folded_into: tensors[key.old] for key in form.keys if not key.new}
    converted = {name: x.detach() for name, x in tensors.items() if form.keeps(name)}
    for name in [name for name in converted if name.endswith(".running_var")]:
        counter = name.removesuffix("running_var") + "num_batches_tracked"
        converted.setdefault(counter, torch.zeros((), dtype=torch.long, device=weight.device))
    for key in form.keys:
        shape = _filled(key.new_shape, sizes)
        if key.old in tensors:
            tensor = tensors[key.old].detach()
        else:
            dtype = torch.long if key.counter else weight.dtype
            tensor = torch.zeros(shape, dtype=dtype, device=weight.device)
        if key.old in biases:
            tensor = tensor - biases[key.old].detach()
        if key.new:
            converted[key.new] = tensor.reshape(shape)
    return converted
