"""Fenced blocks of code in Markdown, and the commands in those of the shell."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# What becomes of a block of each language.
LANGUAGES = {
    "pycon": "run by doctest",
    "python": "run by tests/test_documentation.py",
    "sh": "run by tests/test_documentation.py, one command after the other",
    "text": "not code: output, formulas, trees of files",
}

# A fence may stand in a quotation or behind the marker of a list's entry. Backticks after the
# fence's own make it code within a line.
_OPENING = re.compile(
    r"(?P<before>(?:\s|>|[-*+]\s|\d+[.)]\s)*)(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)"
)
_CODE = re.compile(
    r"\s*(?:\$ \S|pip install |make [a-z]+(?: [A-Z]+=\S+)*(?:\s+#|$)|torchrun |python \S+\.py"
    r"|fullattn [a-z]+ (?:-|\S+[./:])"
    r"|import \w+$|from [\w.]+ import )"
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: what it is in, for messages.
        line: of its opening fence, from 1; the text begins on the next one.
        language: the first word behind the fence, or nothing.
        text: without the indentation of the fence.
    """

    page: str
    line: int
    language: str
    text: str

    def faults(self) -> list[str]:
        """Why some of it would not be run, each with page and line."""
        found = []
        here = f"{self.page}:{self.line}"
        if self.language not in LANGUAGES:
            what = f"the language {self.language!r}" if self.language else "no language"
            found.append(f"{here}: a block of {what}; expected one of {', '.join(LANGUAGES)}")
        prompts = re.search(r"^\s*>>> ", self.text, re.MULTILINE) is not None
        if prompts and self.language != "pycon":
            found.append(f"{here}: a block with >>> is of pycon, not of {self.language or 'none'}")
        if not prompts and self.language == "pycon":
            found.append(f"{here}: a block of pycon without >>>, in which doctest runs nothing")
        for number, line in enumerate(self.text.splitlines(), start=self.line + 1):
            if re.search(r"#\s*doctest:.*\+SKIP", line):
                found.append(f"{self.page}:{number}: +SKIP, so that doctest does not run it")
            if self.language == "text" and _CODE.match(line):
                found.append(f"{self.page}:{number}: code in a block of text: {line.strip()}")
        return found


@dataclass(frozen=True)
class Page:
    """A page's blocks, and what is wrong with its fences."""

    name: str
    blocks: tuple[Block, ...]
    faults: tuple[str, ...]

    def of(self, *languages: str) -> list[Block]:
        """Its blocks of these languages, in order."""
        return [block for block in self.blocks if block.language in languages]


def read(name: str, text: str) -> Page:
    """Find the fenced blocks of a page, also in lists, quotations, admonitions and tabs.

    What stands in a comment (<!-- ... -->) is not on the page.
    """
    blocks: list[Block] = []
    faults: list[str] = []
    lines = [line.expandtabs(4) for line in text.splitlines()]
    comment = False
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        opening = None if comment else _OPENING.fullmatch(line)
        if opening is None:
            *_, last = re.split("(<!--|-->)", f"{'<!--' if comment else ''}{line}")[1::2] or [""]
            comment = last == "<!--"
            continue
        begin, width, fence = number, len(opening["before"]), opening["fence"]
        closing = re.compile(rf"[\s>]*{re.escape(fence)}{re.escape(fence[0])}*\s*")
        inside = []
        while number < len(lines) and not closing.fullmatch(lines[number]):
            before, content = lines[number][:width], lines[number][width:]
            if before.strip("> "):
                faults.append(f"{name}:{number + 1}: indented less than the fence above it")
            inside.append(content)
            number += 1
        if number == len(lines):
            faults.append(f"{name}:{begin}: a block that does not end")
        number += 1
        language = (opening["info"].split() or [""])[0]
        blocks.append(Block(name, begin, language, "\n".join([*inside, ""])))
    return Page(name, tuple(blocks), tuple(faults + [x for b in blocks for x in b.faults()]))


@dataclass(frozen=True)
class Command:
    """One command of a shell, without its comment and with its continued lines joined."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    def words(self) -> tuple[dict[str, str], list[str]]:
        """The variables set for the command alone, and its words.

        Raises:
            ValueError: it needs more of a shell than words, quotes and patterns of file names.
        """
        if re.search(r"[$`]", re.sub(r"'[^']*'", "", self.text)):
            raise ValueError("variables and commands within commands are not run here")
        reader = shlex.shlex(self.text, posix=True, punctuation_chars=";<>|&")
        reader.whitespace_split = True
        reader.commenters = ""
        words = list(reader)
        for word in words:
            if not word.strip(";<>|&"):
                raise ValueError(f"{word} is not run here")
        count = next((i for i, x in enumerate(words) if not re.match(r"[A-Za-z_]\w*=", x)), 0)
        return dict(word.split("=", 1) for word in words[:count]), words[count:]


def _without_comment(line: str) -> str:
    """A line up to a # that begins a word."""
    before = re.match(r"""(?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*""", line)
    assert before is not None
    rest = line[before.end() :]
    return (before[0] if rest.startswith("#") or not rest else line).rstrip()


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block, in order; && divides them as the end of a line does."""
    begun, text = 0, ""
    for number, line in enumerate([*block.text.splitlines(), ""], start=block.line + 1):
        begun = begun if text else number
        text += _without_comment(line).lstrip()
        if text.endswith("\\"):
            text = f"{text[:-1].rstrip()} "
            continue
        for part in text.split("&&"):
            if part.strip():
                yield Command(block.page, begun, part.strip())
        text = ""


def call(arguments: list[str], folder: Path, said: Path) -> None:
    """`fullattn` with these arguments, for a process that ends with its exit status.

    Args:
        arguments: without the program's name.
        folder: it runs in.
        said: file for all that it says.
    """
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.chdir(folder)
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        from fullattn._cli.main import main

        sys.exit(main(arguments))
