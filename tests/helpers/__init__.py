"""What tests of several packages share."""

from pathlib import Path

__all__ = ["ROOT", "SHARED_DATA"]

ROOT = Path(__file__).parents[2]
# Data sets and weights outside the repository; tests of them are skipped where it is absent.
SHARED_DATA = ROOT.parent / "shared" / "data"
