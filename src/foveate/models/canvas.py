"""What all figures share: matplotlib, if it's there, and a file of a kind that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.ops.errors import InputError, MissingPackageError


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing into files.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as found
    except ImportError as error:
        raise MissingPackageError(
            "The figure needs matplotlib: pip install 'foveate[report]'"
        ) from error
    return found


def pyplot_for(path: Path) -> Any:
    """Pyplot, once the file's kind is one that it writes.

    Raises:
        InputError: a suffix that matplotlib doesn't write.
        MissingPackageError: matplotlib isn't there.
    """
    found = pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f"{path}: expected a name that ends in one of .{', .'.join(kinds)}.")
    return found


def save(pyplot: Any, figure: Any, path: Path) -> Path:
    """Write a figure and let go of it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
