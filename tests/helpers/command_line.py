"""Run a command in this process, its errors as exceptions."""

from __future__ import annotations

from fullattn._cli.main import parser_of, run

__all__ = ["run_command"]


def run_command(name: str, *arguments: object) -> None:
    """Run `fullattn NAME ARGUMENTS`; UsageError and SystemExit are not caught."""
    args = parser_of(name).parse_args([name, *map(str, arguments)])
    run(args)
