"""Put a layer into a network that is there already, say what was done, and take it out again."""

from fullattn.surgery.operations import insert, remove, swap
from fullattn.surgery.report import Change, Report
from fullattn.surgery.shadow import count_flops

__all__ = ["Change", "Report", "count_flops", "insert", "remove", "swap"]
