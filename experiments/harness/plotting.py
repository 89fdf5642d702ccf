"""The look of every figure. matplotlib is loaded when the first is drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

COLOURS = ("#1b6ca8", "#d1495b", "#3d8b5f", "#8a5aa8", "#e08e2b", "#7f7f7f", "#2aa9b8", "#a0785a")
OURS, KIVI, VLLM, PER_TOKEN, FP8, PLAIN, SCALAR = COLOURS[:7]
"""The colour of a thing, in every figure that shows it; PLAIN is what is not compressed."""

INKS = {"light": "#222222", "dark": "#e6e6e6"}
"""Colours of text and axes on light and on dark pages."""


def save_themes(folder: Path, name: str, draw: Callable[[], Figure], source: str = "") -> None:
    """Write `name`-light.svg and `name`-dark.svg, which say from what they were drawn."""
    import matplotlib

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    about = {"Date": None} | ({"Source": source} if source else {})
    folder.mkdir(exist_ok=True)
    for theme, ink in INKS.items():
        style: dict[Any, Any] = dict.fromkeys(inked, ink) | {
            "svg.hashsalt": name,
            "svg.fonttype": "none",
        }
        with matplotlib.rc_context(style):
            path = folder / f"{name}-{theme}.svg"
            draw().savefig(path, transparent=True, metadata=about)


def panels(rows: int, columns: int, width: float = 4.6, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure with a 2-d array of axes."""
    from matplotlib import figure as matplotlib

    figure = matplotlib.Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_prop_cycle(color=COLOURS)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.tick_params(labelsize=8)
    return figure, axes


def label(axis: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, axes and, where something has a name, the legend."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


def bar_groups(axis: Axes, groups: list[str], series: dict[str, list[float]]) -> None:
    """Bars of several series side by side, one group for each name."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        offset = (i - (len(series) - 1) / 2) * width
        axis.bar(np.arange(len(groups)) + offset, values, width, label=name)
    axis.set_xticks(np.arange(len(groups)), groups, fontsize=7)
