"""`fullattn yolo`: Ultralytics' `yolo` command with the layers."""

from __future__ import annotations

import argparse
import sys

from fullattn._cli.errors import sentences

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run `fullattn yolo`."""
    sys.argv = ["yolo", *args.arguments]  # Ultralytics reads them when it is imported
    from ultralytics.cfg import entrypoint

    from fullattn.integrations.ultralytics import register

    register()
    with sentences():
        entrypoint()
