"""The figure of `fidelity`: loss against true bytes, and curves over what was varied."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.fidelity.pareto import pareto
from experiments.harness.experiment import Row, distinct, where
from experiments.harness.plotting import OURS, PLAIN, SCALAR, bar_groups, label, panels


def figure(rows: Sequence[Row]) -> Figure | None:
    """Loss against bytes, large; below it a panel for whatever else was measured, if anything."""
    drawn = list(_panels(rows))
    large = bool({"chosen", "candidate"} & {*distinct(rows, "kind")})
    if not drawn and not large:
        return None
    lines = max(1, math.ceil(len(drawn) / 3)) + 2 * large
    made, axes = panels(lines, 3, 4.8, 3.6)
    if large:
        grid = axes[0, 0].get_gridspec()
        for axis in axes[:2].ravel():
            axis.remove()
        pareto(made.add_subplot(grid[:2, :]), rows)
    small = axes[2 * large :].ravel()
    for axis, draw in zip(small, drawn, strict=False):
        draw(axis)
    for axis in small[len(drawn) :]:
        axis.remove()
    return made


def _panels(rows: Sequence[Row]) -> Iterator[Callable[[Axes], None]]:
    kinds = distinct(rows, "kind")
    if "curve" in kinds:
        yield from (partial(draw, rows=rows) for draw in (_bits, _windows))
    if "context" in kinds:
        yield partial(_contexts, rows=rows)
    for kind, draw in (("centring", _centring), ("length", _over_length)):
        for model in distinct(where(rows, kind=kind), "model"):
            yield partial(draw, rows=where(rows, model=model, kind=kind, text="all"))


def _bits(axis, rows: Sequence[Row]) -> None:
    curve = {row["preset"]: row for row in where(rows, kind="curve", text="all")}
    for words, name in (
        ("keys and values", "K{0} V{0} w64"),
        ("keys only", "K{0} Vfull w64"),
        ("values only", "Kfull V{0} w64"),
        ("both, trellis", "K{0} V{0} trellis w64"),
        ("both, no window, sinks or centring", "K{0} V{0} w0 sinks0 uncentred"),
    ):
        found = {
            bits: curve[name.format(bits)] for bits in range(1, 9) if name.format(bits) in curve
        }
        axis.plot(list(found), [row["kl"] for row in found.values()], "o-", ms=3, label=words)
    axis.set_yscale("log")
    label(axis, "bits", "bits a channel", "KL, nats a token")


def _windows(axis, rows: Sequence[Row]) -> None:
    curve = {row["preset"]: row for row in where(rows, kind="curve", text="all")}
    for name in ("K3 V3", "K2 V2 trellis"):
        sizes = (0, 16, 32, 64, 128, 256, 512)
        found = {w: curve[f"{name} w{w}"] for w in sizes if f"{name} w{w}" in curve}
        axis.plot(list(found), [row["kl"] for row in found.values()], "o-", ms=3, label=name)
    axis.set_yscale("log")
    label(axis, "recent window", "tokens", "KL, nats a token")


def _contexts(axis, rows: Sequence[Row]) -> None:
    points = [r for r in rows if r["kind"] in ("context", "chosen") and r["text"] == "all"]
    for name in dict.fromkeys(row["preset"] for row in where(rows, kind="context")):
        found = sorted(where(points, preset=name), key=lambda row: row["context"])
        axis.plot(
            [row["context"] for row in found], [row["kl"] for row in found], "o-", ms=3, label=name
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    label(axis, "length of the text", "tokens", "KL, nats a token")


def _centring(axis, rows: Sequence[Row]) -> None:
    """Both means of one model."""
    ways = {"after RoPE": "", "before RoPE": " pre-RoPE", "not centred": " uncentred"}
    found = {row["preset"]: row["kl"] for row in rows}
    names = [row["preset"] for row in rows if row["centred"] == 1]
    bars = {w: [found.get(f"{name}{end}", math.nan) for name in names] for w, end in ways.items()}
    axis.set_prop_cycle(color=(SCALAR, OURS, PLAIN))
    bar_groups(axis, [name.removesuffix(" w128") for name in names], bars)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    label(axis, f"{rows[0]['model']}: keys centred", "", "KL, nats a token")


def _over_length(axis, rows: Sequence[Row]) -> None:
    """Both means of one model."""
    for name in distinct(rows, "preset"):
        found = sorted(where(rows, preset=name), key=lambda row: row["context"])
        lengths, errors = [row["context"] for row in found], [row["kl_se"] for row in found]
        kls = [row["kl"] for row in found]
        line = "-" if name.endswith("pre-RoPE") else "--"
        axis.errorbar(lengths, kls, errors, fmt=f"o{line}", ms=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    title = f"{rows[0]['model']}: the last {rows[0]['last']:,} tokens"
    label(axis, title, "tokens of context", "KL, nats a token")
