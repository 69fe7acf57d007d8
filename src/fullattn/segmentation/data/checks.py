"""What a look at every file of a data set found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fullattn.segmentation.data.errors import DataError
from fullattn.segmentation.data.listing import Problem, some

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Counts of a data set, and what is wrong with which of its files.

    Args:
        name: of the data set.
        split: of the data set.
        images: how many images were looked at, good and bad.
        sizes: how many good images there are of each (H, W).
        pixels: how many labelled pixels each class has in the good masks; empty if the files were
            not decoded.
        ignored: how many pixels have no label.
        problems: the bad files, one problem for each bad sample.
        dropped: what had been left out before.
    """

    name: str
    split: str
    images: int
    sizes: Mapping[tuple[int, int], int]
    pixels: Mapping[str, int]
    ignored: int
    problems: tuple[Problem, ...]
    dropped: tuple[Problem, ...] = ()

    @property
    def absent(self) -> tuple[str, ...]:
        """The classes that no mask has."""
        return tuple(name for name, count in self.pixels.items() if count == 0)

    def raise_for_problems(self) -> None:
        """Raise if a file is bad.

        Raises:
            DataError: names the first few bad files and says how many there are.
        """
        if self.problems:
            listed = some((f"{path} {reason}" for path, reason in self.problems), limit=3)
            raise DataError(
                f"{len(self.problems)} of {self.images} samples of {self.name} {self.split} are "
                f"bad: {listed}",
                *(problem.path for problem in self.problems),
            )

    def __str__(self) -> str:
        lines = [f"{self.name} {self.split}: {self.images} images, {len(self.problems)} bad"]
        if self.dropped:
            lines[0] += f", {len(self.dropped)} files left out"
        sizes = [f"{count} of {height}×{width}" for (height, width), count in self.sizes.items()]
        if sizes:
            lines.append(f"  sizes (height × width): {some(sizes)}")
        if self.pixels:
            total = max(1, self.ignored + sum(self.pixels.values()))
            lines.append(f"  pixels without label: {100 * self.ignored / total:.1f} %")
        if self.absent:
            lines.append(f"  classes in no mask: {some(self.absent, limit=20)}")
        lines += [f"  bad: {path} {reason}" for path, reason in self.problems]
        lines += [f"  left out: {path} {reason}" for path, reason in self.dropped]
        return "\n".join(lines)
