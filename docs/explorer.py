"""What the cost explorer evaluates: the formulas of `fullattn.costs` with symbols for the sizes.

    layers: for each layer its class and, with and without the options of a head, for each backend
            either why it cannot run or where in `terms` its figures are; which backends the rule
            tries, and where the figures are that decide
    terms:  integers, symbols and operations on earlier terms; docs/javascripts/costs.js evaluates
            them

Everything comes from the registry of layers and the declarations of backends: a new one of either
needs nothing here and nothing in JavaScript.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from fullattn import costs
from fullattn.attention import dispatch
from fullattn.attention.backend import Setting
from fullattn.attention.sizes import Expression
from fullattn.layers import LAYERS, AttentionLayer

__all__ = ["DEVICES", "data", "script"]

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
SYMBOLS = ("batch", "channels", "height", "width", "size", "threads")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def data() -> dict[str, Any]:
    """Write the formulas of all registered layers, with default options, as plain data."""
    sizes: list[Any] = []

    def place(size: Any) -> int:
        sizes.append(size)
        return len(sizes) - 1

    layers = {name: _layer(layer, place) for name, layer in LAYERS.items()}
    terms, places = _graph(sizes)
    return {
        "layers": layers,
        "devices": DEVICES,
        "dtypes": DTYPES,
        "backends": {entry.name: entry.summary for entry in dispatch.BACKENDS},
        "terms": terms,
        "places": places,
    }


def _graph(sizes: list[Any]) -> tuple[list[Any], list[int]]:
    """Write sizes as data.

    Returns:
        The terms, each an integer, the name of a symbol, or a list of an operation and the places
        of its operands among the terms before it; and the place of each size.

    Example:
        >>> _graph([Expression("symbol", "height") * 2 + 1, 7])
        (['height', 2, ['*', 0, 1], 1, ['+', 2, 3], 7], [4, 5])
    """
    terms: list[Any] = []
    places: dict[Any, int] = {}

    def place(size: Any) -> int:
        if isinstance(size, Expression) and size in places:
            return places[size]
        term: Any = size
        if isinstance(size, Expression):
            symbol = size.operation == "symbol"
            term = size.arguments[0] if symbol else (size.operation, *map(place, size.arguments))
        if term not in places:
            places[term] = len(terms)
            terms.append(list(term) if isinstance(term, tuple) else term)
        places[size] = places[term]
        return places[term]

    found = [place(size) for size in sizes]
    return terms, found


def _layer(layer: type[AttentionLayer], place: Any) -> dict[str, Any]:
    forms = {"bare": layer.head_options, "whole": {}}
    return {
        "title": layer.__name__,
        "projects": bool(layer.head_options),
        "forms": {
            name: {
                device: _form(layer(8, device="meta", **options), device, place)
                for device in DEVICES
            }
            for name, options in forms.items()
        },
    }


def _form(layer: AttentionLayer, device: str, place: Any) -> dict[str, Any]:
    """One layer on one device."""
    batch, channels, height, width, size, threads = (Expression("symbol", name) for name in SYMBOLS)
    shape, setting = (batch, channels, height, width), Setting(size, device, threads)
    work = layer.work(shape, size)
    of_sizes = costs.inputs_of(layer, shape, torch.float32, device)
    backends = {}
    for entry in dispatch.BACKENDS:
        there = replace(entry, unavailable=lambda: None)
        reasons = {}
        for name in DTYPES:
            # A shape that no limit excludes, for what does not depend on the shape.
            inputs = costs.inputs_of(layer, (1, 8, 8, 8), getattr(torch, name), device)
            if against := there.reasons_against(inputs):
                reasons[name] = f"{entry.name} {'; '.join(against)}"
        found = {"reasons": reasons, "most_features": entry.most_features}
        if len(reasons) < len(DTYPES):
            figures = vars(costs.figures(layer, shape, setting, entry))
            found["figures"] = {name: place(figure) for name, figure in figures.items()}
        backends[entry.name] = found
    return {
        "parameters": place(work.parameters),
        "backends": backends,
        "features": place(of_sizes.features),
        "map_numel": None if of_sizes.sliced else place(of_sizes.map_numel),
        "token_numel": place(of_sizes.token_numel),
        "fused": [entry.name for entry in dispatch.fused(of_sizes)],
        "builds": next(entry.name for entry in dispatch.BACKENDS if entry.builds_map),
    }


def script() -> str:
    """Write the data as a script that defines `fullattnCostData`."""
    return f"const fullattnCostData = {json.dumps(data(), separators=(',', ':'))};\n"
