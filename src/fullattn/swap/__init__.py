"""Put layers into an existing model, report the changes, and undo them.

`fullattn.swap` is the function; import what else this package has with `from fullattn.swap import`.
"""

from fullattn.swap.operations import insert, remove, replay, swap
from fullattn.swap.report import Change, Report
from fullattn.swap.shapes import count_flops

__all__ = ["Change", "Report", "count_flops", "insert", "remove", "replay", "swap"]
