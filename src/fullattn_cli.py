"""The entry point of the command `fullattn`.

It is outside of the package because Python runs the package's `__init__`, which imports PyTorch for
seconds, before any module inside. Help and bad arguments need no PyTorch.
"""

import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """Read the command line, then run the package's `__init__`, then the command."""
    spec = importlib.util.find_spec("fullattn")
    loader = spec and spec.loader
    assert spec
    assert loader
    package = importlib.util.module_from_spec(spec)
    sys.modules["fullattn"] = package  # its modules can be imported

    from fullattn._cli.main import main as run

    return run(load=lambda: loader.exec_module(package))
