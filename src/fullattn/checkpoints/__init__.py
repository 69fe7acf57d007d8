"""Load weights that were trained with other projects' layers, and convert them back.

`convert` renames and reshapes the state dict of one layer, `load_into` also loads it into a layer,
and `load` reads a checkpoint without running code in it. `table` lists the layers, and the options
with which ours computes the same as theirs.
"""

from fullattn.checkpoints.conversion import convert, load_into
from fullattn.checkpoints.files import CheckpointError, load
from fullattn.checkpoints.mappings import table

__all__ = ["CheckpointError", "convert", "load", "load_into", "table"]
