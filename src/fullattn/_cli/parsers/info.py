"""Arguments of `fullattn info`."""

from __future__ import annotations

from fullattn._cli.arguments import LAYER_HELP, Parser, add_conditions

__all__ = ["configure"]

_INFO_EXAMPLES = """\
examples:
  fullattn info
  fullattn info --shape 4x128x64x64 --dtype bfloat16 --layer fully
  FULLATTN_BACKEND=sdpa fullattn info
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn info`."""
    parser.description = (
        "Versions, the device, and for a shape, dtype and device which backend runs "
        "and why each other one does not."
    )
    parser.epilog = _INFO_EXAMPLES
    parser.add_argument(
        "--shape", default="512x97x97", metavar="SHAPE", help="CxHxW or BxCxHxW (512x97x97)"
    )
    parser.add_argument("--layer", nargs="+", metavar="LAYER", help=LAYER_HELP)
    add_conditions(parser)
    parser.set_defaults(run="fullattn._cli.info:run")
