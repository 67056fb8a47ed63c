"""A figure of matplotlib that a notebook shows: made without pyplot, so nothing stays open."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Plot(Figure):
    """A matplotlib figure that a notebook shows, whatever backend is chosen there, if any."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def canvas(width: float, height: float) -> Plot:
    """An empty plot of so many inches, on white."""
    figure = Plot(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
