"""Draw similarity maps: `similarity` as a figure, `page` as an interactive HTML page.

`layers_with_maps` and `inputs_of` find the layers of a network and their inputs. Requires
matplotlib: `pip install 'fullattn[plot]'`.
"""

from fullattn._text import installing

try:
    import matplotlib as _  # noqa: F401
except ImportError as _error:
    raise ImportError(
        f"fullattn.plot needs matplotlib: {installing('plot')} ({_error})"
    ) from _error

from fullattn.plot.draw import similarity
from fullattn.plot.layers import inputs_of, layers_with_maps
from fullattn.plot.pages import page

__all__ = ["inputs_of", "layers_with_maps", "page", "similarity"]
