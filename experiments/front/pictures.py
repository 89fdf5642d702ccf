"""README's two pictures, from committed rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.front.tables import (
    BIASED,
    DECODERS,
    PRESETS,
    SHAPES,
    SMALL,
    STORED,
    centred,
    one,
    rows_of,
)
from experiments.harness import plotting
from experiments.harness.experiment import Row, where
from experiments.harness.plotting import Axes, Figure
from experiments.speed.llama_figure import limit_of


def loss(out: Path) -> Figure:
    """KL against size: presets and peers on one model, what centring is worth on another."""
    rows, shared = rows_of("fidelity", out), rows_of("layer_ablation.pre_rope", out)
    made, ((left, right),) = plotting.panels(1, 2, 4.5, 3.6)
    for axis, model in ((left, SMALL), (right, BIASED)):
        ours = {name: centred(rows, model, setting) for name, setting in PRESETS.items()}
        _curve(axis, [*ours.values()], plotting.OURS)
        for name, row in ours.items():
            _say(axis, row, name, plotting.OURS, (-5, 3), ha="right")
    by_head = [f"by head {setting} pre-RoPE" for setting in PRESETS.values()][1:]
    found = [one(shared, preset=name) for name in by_head]
    _curve(left, found, plotting.OURS, "o--")
    _say(left, found[-1], "bits by head", plotting.OURS)
    left.text(3.7, 1.1e-3, "this library", fontsize=8.5, color=plotting.OURS, weight="bold")
    peers = where(rows, kind="peer", model=SMALL, text="all")
    for names, words, colour in (
        (("KIVI int4", "KIVI int2"), "KIVI", plotting.KIVI),
        (("vLLM 4bit_nc, every layer", "vLLM 3bit_nc, every layer"), "vLLM", plotting.VLLM),
        (("per-token int4", "per-token int2"), "per token", plotting.PER_TOKEN),
        (("fp8",), "fp8", plotting.FP8),
    ):
        found = [one(peers, preset=name) for name in names]
        _curve(left, found, colour)
        _say(left, found[-1], words, colour)
    found = [centred(rows, BIASED, setting, "") for setting in PRESETS.values()]
    _curve(right, found, plotting.SCALAR)
    _say(right, found[1], "mean of stored keys", plotting.SCALAR, (4, -12))
    bare = centred(rows, BIASED, PRESETS["lossless"], " uncentred")
    _curve(right, [bare], plotting.PLAIN)
    _say(right, bare, "not centred", plotting.PLAIN)
    right.text(4.4, 6e-3, "mean before RoPE", fontsize=8.5, color=plotting.OURS, weight="bold")
    titles = "SmolLM2-135M, 8,192 tokens", "Qwen2.5-Coder-0.5B, 4,096 tokens"
    for axis, title in zip((left, right), titles, strict=True):
        axis.set(yscale="log", ylim=(8e-4, 3), xlim=(1.7, 7.4))
        plotting.label(axis, title, "times smaller than bfloat16, every byte counted", "", False)
    left.set_ylabel("loss: KL, nats a token", fontsize=9)
    return made


def _say(axis: Axes, row: Row, words: str, colour: str, offset=(7, -3), ha: str = "left") -> None:
    axis.annotate(
        words, (row["ratio"], row["kl"]), offset, textcoords="offset points", fontsize=8.5,
        color=colour, ha=ha,
    )  # fmt: skip


def _curve(axis: Axes, rows: Sequence[Row], colour: str, line: str = "o-") -> None:
    xs, ys = ([row[name] for row in rows] for name in ("ratio", "kl"))
    axis.errorbar(xs, ys, [row["kl_se"] for row in rows], fmt=line, ms=4, lw=1.6, color=colour)


def speed(out: Path) -> Figure:
    """Times faster against times fewer bytes: attention alone, and a whole decoder.

    Rings are 4 bits with the mean before RoPE, where the lines are without it.
    """
    made, ((left, right),) = plotting.panels(1, 2, 4.5, 3.6)
    _attention(left, rows_of("decode_speed", out), rows_of("decode_speed.mean", out))
    _decoder(right, rows_of(STORED, out), rows_of("llama_speed", out))
    for axis, top, title in (
        (left, 9.6, "decode attention alone, over cuDNN"),
        (right, 6.9, "a whole 8B decoder, tokens a second"),
    ):
        axis.plot((1, top), (1, top), ":", color=plotting.PLAIN, lw=1.2)
        axis.set(xlim=(1, top), ylim=(0.3, top * 0.8))
        plotting.label(axis, title, "times fewer bytes read for a token", "", False)
    words = "the limit: time saved\nas bytes are"
    left.text(5.9, 6.3, words, ha="right", fontsize=8.5, color=plotting.PLAIN)
    words = "rings: 4 bits with\nthe mean before RoPE"
    right.text(4.0, 0.9, words, fontsize=8.5, color=plotting.PLAIN)
    left.set_ylabel("times faster than bfloat16", fontsize=9)
    return made


def _attention(axis: Axes, rows: Sequence[Row], means: Sequence[Row]) -> None:
    """A line for each shape, over 4, 3 and 2 bits."""
    for (batch, tokens), colour in zip(SHAPES, plotting.COLOURS, strict=False):
        case = where(rows, batch=batch, tokens=tokens)
        base = _bytes(where(case, implementation="cudnn")[0])
        wanted = [dict(implementation="pallas", bits_k=b, bits_v=b) for b in (4, 3, 2)]
        found = [where(case, **each)[0] for each in wanted]
        points = [(base / _bytes(row), row["speedup_over_cudnn"]) for row in found]
        _path(axis, points, f"{batch} x {tokens:,}", colour, {4096: 4, 131072: -5}.get(tokens, 0))
        turned = where(means, batch=batch, tokens=tokens, mean="pre_rope", queries=4)
        _rings(axis, [(points[0][0], row["speedup_over_cudnn"]) for row in turned], colour)
        if tokens == 131072:
            for (x, _), row in zip(points, found, strict=True):
                axis.text(x, 0.55, f"{row['bits_k']} bits", ha="center", fontsize=8.5)


def _decoder(axis: Axes, rows: Sequence[Row], turned: Sequence[Row]) -> None:
    """A line for each case, over the bits that were timed."""
    colours = *plotting.COLOURS[:2], *plotting.COLOURS[3:5]
    for case, colour in zip(DECODERS, colours, strict=True):
        base = one(rows, case=case, bits_k=16)
        found = [row for row in where(rows, case=case) if row["bits_k"] != 16]
        points = [(limit_of(row, base), row["ratio_to_baseline"]) for row in found]
        sizes = f"{base['batch']} x {base['context']:,}"
        words = "as many as fit\nx 4,096" if case.startswith("largest") else sizes
        _path(axis, points, words, colour)
        for own in where(turned, case=case, bits_k=16):
            four = one(turned, case=case, bits_k=4)
            _rings(axis, [(limit_of(four, own), four["ratio_to_baseline"])], colour)


def _bytes(row: Row) -> float:
    return row["gigabytes_per_second"] * row["milliseconds"]


def _path(
    axis: Axes, points: Sequence[tuple[float, float]], words: str, colour: str, up: int = 0
) -> None:
    axis.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.6, color=colour)
    axis.annotate(
        words, points[-1], (7, up), textcoords="offset points", fontsize=8.5, color=colour,
        va="center",
    )  # fmt: skip


def _rings(axis: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    for x, y in points:
        axis.plot(x, y, "o", ms=5, mfc="none", color=colour)


PICTURES: dict[str, tuple[Callable[[Path], Figure], tuple[str, ...]]] = {
    "loss": (loss, ("fidelity", "layer_ablation.pre_rope")),
    "speed": (speed, ("decode_speed", "decode_speed.mean", "llama_speed", STORED)),
}
"""How each is drawn, and from which results."""
