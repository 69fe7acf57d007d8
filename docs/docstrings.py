"""The sections of our docstrings in words that mkdocstrings has a section for.

It reads Google style, to which we add Shape and Source, and says Examples where we say Example.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHAPE = re.compile(r"^Shape:\n((?:    .*\n?)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewords each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Reword the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = reworded(obj.docstring.value)


def reworded(docstring: str) -> str:
    r"""Rename Example to Examples, and make each line of Shape a point.

    Example:
        >>> print(reworded("Add.\n\nShape:\n    x: (B).\n    y: as x,\n        or so.\n"))
        Add.
        <BLANKLINE>
        Shape:
            - x: (B).
            - y: as x,
                or so.
        <BLANKLINE>
    """
    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    return _SHAPE.sub(
        lambda found: "Shape:\n" + re.sub(r"^    (?=\S)", "    - ", found[1], flags=re.MULTILINE),
        docstring,
    )
