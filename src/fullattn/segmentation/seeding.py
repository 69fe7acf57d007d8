"""Seeds of independent random number streams."""

from __future__ import annotations

import hashlib

__all__ = ["random_seed"]


def random_seed(*integers: int) -> int:
    """Hash integers to a seed, so that neighbouring integers give unrelated random numbers.

    Args:
        integers: for example seed, epoch and index.

    Returns:
        An integer from 0 to 2⁶³ - 1, the same on every machine.

    Example:
        >>> random_seed(0, 1) == random_seed(0, 1), random_seed(0, 1) == random_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(repr(integers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
