"""The figures of the concept pages, for light and for dark ones: `python -m docs.figures`.

They show ideas, and numbers that follow from formulas; what was measured is in the report.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import turboquant_jax as tq
from experiments.harness.plotting import save_themes
from turboquant_jax.cache import load_calibration

FOLDER = Path(__file__).parent / "images"
CALIBRATION = Path(__file__).parents[1] / "experiments/calibrations/smollm2-135m.safetensors"
EXACT, CODES, SCALES, NEW = "#d1495b", "#1b6ca8", "#e08e2b", "#3d8b5f"


def figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Axes side by side, without the upper and the right edge."""
    made = Figure(figsize=(width, height), layout="constrained")
    axes = list(made.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes


def box(axis: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = ""):
    """A filled rectangle with a text in it."""
    axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, alpha=0.85, linewidth=0))
    if text:
        style = dict(ha="center", va="center", fontsize=9, color="white")
        axis.text(x + width / 2, y + height / 2, text, **style)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one point to another, in the colour of the text."""
    ink = matplotlib.rcParams["text.color"]
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=ink))


def drawing(axis: Axes, width: float, height: float) -> None:
    """Axes without ticks, from 0 to these."""
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()


def rotated() -> Figure:
    """A vector with two large channels, before and after a rotation."""
    made, (left, right) = figure(8, 2.6, 2)
    x = np.array(jax.random.normal(jax.random.key(4), (64,)))
    x[[9, 40]] = 14.0, -9.0
    quantizer = tq.create_quantizer(jax.random.key(0), dim=64, bits=2)
    y = np.asarray(quantizer.rotation.apply(x))
    size = np.linalg.norm(x) / 8
    left.bar(np.arange(64), x / size, color=EXACT, width=0.8)
    right.bar(np.arange(64), y / size, color=CODES, width=0.8)
    for level in quantizer.levels:
        right.axhline(level, color=SCALES, linewidth=1)
    right.text(1, 5.6, "levels of 2 bits", color=SCALES, fontsize=9)
    for axis, title in ((left, "a vector"), (right, "the same, rotated")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("channel", fontsize=9)
        axis.set_ylim(-5, 6.5)
    left.set_ylabel("in units of the root mean square", fontsize=9)
    return made


def trellis() -> Figure:
    """Eight levels in four interleaved subsets, of which a state offers two."""
    from turboquant_jax.quantizers.trellis import levels

    made, (axis,) = figure(7, 2.2)
    found = levels(2)
    colours = (CODES, EXACT, NEW, SCALES)
    for row, (offered, text) in enumerate(
        (
            ((0, 1, 2, 3), "all 8 levels"),
            ((0, 2), "on offer if u[t-2] = 0"),
            ((1, 3), "if u[t-2] = 1"),
        )
    ):
        for number, level in enumerate(found):
            held = number % 4 in offered
            axis.plot(
                level, -row, "o", color=colours[number % 4], alpha=1.0 if held else 0.15, ms=10
            )
        axis.text(-2.9, -row, text, ha="right", va="center", fontsize=9)
    axis.set(xlim=(-4.9, 2.6), ylim=(-2.6, 0.6), yticks=[])
    axis.spines["left"].set_visible(False)
    axis.set_xticks([-2, -1, 0, 1, 2])
    axis.set_xlabel("level, in standard deviations; a colour is a subset", fontsize=9)
    return made


def page() -> Figure:
    """The arrays of a page of 3 bits."""
    made, (axis,) = figure(7.5, 3.2)
    drawing(axis, 15, 6.4)
    box(axis, 0.2, 3.4, 4.0, 2.4, CODES, "2 bits")
    box(axis, 4.4, 3.4, 2.0, 2.4, CODES, "1 bit")
    axis.text(3.3, 6.0, "keys: a row is a token", ha="center", fontsize=9)
    box(axis, 7.6, 2.2, 2.4, 3.6, NEW, "2 bits")
    box(axis, 10.2, 2.2, 1.2, 3.6, NEW, "1 bit")
    axis.text(9.5, 6.0, "values: a row is a channel", ha="center", fontsize=9)
    box(axis, 12.8, 3.4, 0.7, 2.4, SCALES)
    axis.text(13.1, 6.0, "scales", ha="center", fontsize=9)
    for text, place in (
        ("channels, packed", ((0.2, 3.1), (6.4, 3.1))),
        ("tokens, packed", ((7.6, 1.9), (11.4, 1.9))),
    ):
        (start, height), (end, _) = place
        arrow(axis, (start, height), (end, height))
        axis.text((start + end) / 2, height - 0.45, text, ha="center", va="center", fontsize=8)
    axis.text(13.1, 3.0, "value | key", ha="center", fontsize=8)
    text = "one page: 64 tokens of one head; the same number serves all layers and heads"
    axis.text(7.3, 0.5, text, ha="center", fontsize=9)
    return made


def place() -> Figure:
    """Where the tokens of growing sequences lie."""
    from turboquant_jax.cache import CacheConfig

    config = CacheConfig(1, 1, 64, sinks=4, window=128, block=64)
    made, (axis,) = figure(8, 2.6)
    lengths = (195, 196, 259, 260, 324)
    for row, length in enumerate(lengths):
        blocks = int(config.compressed_tokens(length))
        y = len(lengths) - row
        box(axis, 0, y, 4, 0.62, EXACT)
        for start in range(0, blocks, 64):
            box(axis, 4 + start + 0.8, y, 62.4, 0.62, CODES, "block" if row == 4 else "")
        box(axis, 4 + blocks, y, length - 4 - blocks, 0.62, NEW, "window" if row == 4 else "")
    axis.text(2, 0.62, "sinks", color=EXACT, fontsize=9, ha="center")
    axis.set(xlim=(-2, 330), ylim=(0.4, 6.0), yticks=np.arange(5, 0, -1) + 0.31)
    axis.set_yticklabels([f"{length} tokens" for length in lengths], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("token", fontsize=9)
    return made


def merge() -> Figure:
    """Segments on their way to one output."""
    made, (axis,) = figure(7.5, 2.4)
    drawing(axis, 15, 4.8)
    segments = (("sinks", EXACT), ("blocks", CODES), ("window", NEW), ("new token", NEW))
    for row, (text, colour) in enumerate(segments):
        y = 3.7 - 1.1 * row
        box(axis, 2.6, y, 2.4, 0.8, colour, text)
        arrow(axis, (1.5, 2.4), (2.6, y + 0.4))
        arrow(axis, (5.0, y + 0.4), (6.6, y + 0.4))
        axis.text(6.8, y + 0.4, f"$o_{row + 1}$, lse$_{row + 1}$", va="center", fontsize=10)
        arrow(axis, (8.6, y + 0.4), (10.2, 2.4))
    axis.text(0.8, 2.4, "query", ha="center", va="center", fontsize=10)
    box(axis, 10.2, 1.9, 2.0, 1.0, SCALES, "merge")
    arrow(axis, (12.2, 2.4), (13.5, 2.4))
    axis.text(14.2, 2.4, "output", ha="center", va="center", fontsize=10)
    return made


def mean() -> Figure:
    """How far a turned mean is from that of the first block's stored keys."""
    made, (axis,) = figure(6.5, 2.8)
    frequencies = 1e6 ** (-np.arange(32) / 32)
    stored = np.exp(1j * np.arange(64)[:, None] * frequencies).mean(axis=0)
    position = np.unique(np.geomspace(1, 131072, 4000).astype(int))
    left = (np.abs(np.exp(1j * position[:, None] * frequencies) - stored) ** 2).mean(axis=1)
    smooth = np.array(
        [left[(position > p / 1.15) & (position < p * 1.15)].mean() for p in position]
    )
    axis.plot(position, smooth, color=EXACT)
    axis.axhline(0, color=CODES)
    axis.set(xscale="log", ylim=(-0.08, 1.8), xlim=(1, 131072))
    axis.text(300, 0.98, "the mean of stored keys", color=EXACT, ha="right", fontsize=9)
    axis.text(300, 0.06, "the mean before RoPE", color=CODES, ha="right", fontsize=9)
    axis.axvspan(1, 64, alpha=0.12, color=SCALES, linewidth=0)
    axis.text(8, 1.6, "first block", color=SCALES, ha="center", fontsize=9)
    axis.set_xlabel("position of the key", fontsize=9)
    axis.set_ylabel("energy left of the mean, share", fontsize=9)
    return made


def channels() -> Figure:
    """What the committed calibration of SmolLM2-135M says: variances, and bits of every head."""
    known = load_calibration(CALIBRATION)
    made, (left, right) = figure(9, 3.4, 2)
    variance = np.asarray(known.keys.variance).reshape(-1, known.keys.variance.shape[-1])
    share = variance / variance.sum(axis=1, keepdims=True) * 100
    low, high = np.quantile(share, (0.05, 0.95), axis=0)
    left.fill_between(np.arange(64), low, high, color=CODES, alpha=0.3, linewidth=0)
    left.plot(np.arange(64), np.median(share, axis=0), color=CODES, linewidth=2)
    for start, end, text in ((0, 16, "4 bits"), (16, 32, "2 bits"), (32, 64, "1 bit")):
        left.axvspan(start - 0.5, end - 0.5, alpha=0.22 - start / 220, color=SCALES, linewidth=0)
        left.text((start + end) / 2 - 0.5, 60, text, ha="center", fontsize=9)
    left.set(yscale="log", ylim=(1e-2, 100), xlim=(-0.5, 63.5))
    left.set_xlabel("channel of the calibrated basis", fontsize=9)
    left.set_ylabel("share of what scores depend on, %", fontsize=9)
    left.set_title("the median of the heads, and nine in ten", fontsize=10)
    chosen = known.study.allocation
    heads = known.keys.variance.shape[1]
    sides = [[_numbers(entry, heads) for entry in side] for side in (chosen.keys, chosen.values)]
    gap = np.full((1, len(sides[0])), np.nan)
    grid = np.vstack([np.array(sides[0]).T, gap, np.array(sides[1]).T])
    shown = right.imshow(grid, aspect="auto", cmap="YlGnBu", vmin=0.5, vmax=4)
    right.set_yticks([1, 5], ["keys", "values"], fontsize=9)
    right.tick_params(axis="y", length=0)
    right.spines[["left", "bottom"]].set_visible(False)
    right.set_xlabel("layer; a row is a head", fontsize=9)
    right.set_title("bits a number that calibrate chose", fontsize=10)
    made.colorbar(shown, ax=right, ticks=[1, 2, 3, 4], shrink=0.8)
    return made


def _numbers(entry: Any, heads: int) -> list[float]:
    """Bits a number of each head of a layer's entry: one for all, or one a head; each an integer or
    groups of channels.
    """

    def bits(one: Any) -> float:
        return one if isinstance(one, int) else sum(n * b for n, b in one) / sum(n for n, _ in one)

    groups = isinstance(entry, tuple) and isinstance(entry[0], tuple)
    whole = isinstance(entry, int) or (groups and isinstance(entry[0][0], int))
    return [bits(entry)] * heads if whole else [bits(one) for one in entry]


FIGURES: dict[str, Callable[[], Figure]] = {
    draw.__name__: draw for draw in (rotated, trellis, page, place, merge, mean, channels)
}


def main() -> None:
    """Draws what is named, or all."""
    for name in sys.argv[1:] or FIGURES:
        save_themes(FOLDER, name, FIGURES[name])


if __name__ == "__main__":
    main()
