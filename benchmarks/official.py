"""The official implementation as a implementation by path: it is defined in `fullattn.bench`.

    fullattn bench --module benchmarks/official.py:OfficialFLANetBlock

It ships inside the package, so that `fullattn bench` has its baseline wherever it is installed.
This file is the example of what `--module` takes: a class called with the number of channels.
"""

from fullattn.bench.official import OfficialFLANetBlock

__all__ = ["OfficialFLANetBlock"]
