"""Put a layer into a network that is there already, say what was done, and take it out again."""

from fullattn.surgery.operations import insert, remove, swap
from fullattn.surgery.report import Change, Report

__all__ = ["Change", "Report", "insert", "remove", "swap"]
