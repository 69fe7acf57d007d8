"""Put a layer into a network that is there already, say what was done, and take it out again."""

from fullattn.swap.operations import insert, remove, swap
from fullattn.swap.report import Change, Report
from fullattn.swap.shapes import count_flops

__all__ = ["Change", "Report", "count_flops", "insert", "remove", "swap"]
