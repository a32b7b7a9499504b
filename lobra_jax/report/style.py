"""Colours, sizes and small helpers that all pictures share. Figures are made without pyplot: no global state."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

WIDTH_INCHES = 11.0
DPI = 130
INK, MUTED, GRID, IDLE = "#1c2330", "#6b7280", "#e3e7ee", "#eef1f6"
MEASURED, PREDICTED, TRAIN, EVAL = "#2563a8", "#d97706", "#9db7d5", "#b4232a"


def figure(height_inches: float) -> Figure:
    """An empty figure of the report's width, laid out so that nothing overlaps."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")


def bucket_colours(lengths: Sequence[int]) -> dict[int, str]:
    """A colour for each padded length, from pale (short) to dark (long)."""
    colours = colormaps["viridis_r"]
    last = max(1, len(lengths) - 1)
    return {length: to_hex(colours(0.12 + 0.8 * index / last)) for index, length in enumerate(lengths)}


def plain(axes: Axes, *, grid: str | None = "y") -> None:
    """Takes away the frame's clutter and puts a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)


def lighter(colour: str, share: float) -> tuple[float, float, float]:
    """`colour` mixed with white; `share` of white, 0 to 1."""
    red, green, blue = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
    return tuple(channel + (1 - channel) * share for channel in (red, green, blue))
