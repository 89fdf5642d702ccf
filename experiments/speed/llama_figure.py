"""The figure of `llama_speed`: times the speed of bfloat16, with what bytes allow marked."""

from collections.abc import Sequence

from experiments.harness.experiment import Row, distinct, where
from experiments.harness.plotting import COLOURS, Axes, Figure, label, panels

_COLOURS = {"8 bits": COLOURS[6], "4 bits": COLOURS[0], "3 bits": COLOURS[2], "2 bits": COLOURS[3]}
_FULL = 16


def limit_of(row: Row, base: Row) -> float:
    """Tokens a second over those of the baseline, if time were bytes of weights and cache read."""
    least, cost = (
        r["fraction_of_roofline"] * r["copy_gigabytes_per_second"] / r["tokens_per_second"]
        for r in (row, base)
    )
    return cost / least


def figure(rows: Sequence[Row]) -> Figure | None:
    """Ratios of each case, and of the longest sequence; None where neither was measured."""
    timed = [row for row in rows if row["case"] not in ("longest", "greedy")]
    long = where(rows, case="longest")
    drawn = [(draw, found) for draw, found in ((_speed, timed), (_longest, long)) if found]
    if not drawn:
        return None
    made, axes = panels(1, len(drawn), 5.2, 3.6)
    for axis, (draw, found) in zip(axes[0], drawn, strict=True):
        draw(axis, found)
    return made


def _speed(axis: Axes, rows: Sequence[Row]) -> None:
    cases = [
        (f"{base['batch']} x {base['context']:,}", case, base)
        for case in distinct(rows, "case")
        for base in where(rows, case=case, bits_k=_FULL)
    ]
    for place, (_, case, base) in enumerate(cases):
        found = [row for row in where(rows, case=case) if row["bits_k"] != _FULL]
        for i, row in enumerate(found):
            x = place + 0.26 * (i - (len(found) - 1) / 2)
            axis.bar(x, row["ratio_to_baseline"], 0.24, color=_COLOURS[row["cache"]])
            axis.text(x, 0.06, row["cache"][0], ha="center", fontsize=8, color="white")
            limit = limit_of(row, base)
            axis.plot((x - 0.12, x + 0.12), (limit, limit), color="#222222", lw=1.5)
    names = [
        f"as many as fit\n(bfloat16: {name})" if case.startswith("largest") else name
        for name, case, _ in cases
    ]
    axis.axhline(1, color="#7f7f7f", lw=1, ls=":")
    axis.set_xticks(range(len(cases)), names)
    axis.grid(False, axis="x")
    title = "tokens a second; the mark is what bytes allow"
    label(axis, title, "sequences x tokens; in a bar its bits", "times bfloat16", False)


def _longest(axis: Axes, rows: Sequence[Row]) -> None:
    limits = sorted(distinct(rows, "memory_limit"))
    for place, limit in enumerate(limits):
        case = where(rows, memory_limit=limit)
        for base in where(case, bits_k=_FULL):
            for i, row in enumerate(row for row in case if row["bits_k"] != _FULL):
                x, ratio = place + 0.4 * i - 0.2, row["context"] / base["context"]
                axis.bar(x, ratio, 0.36, color=_COLOURS[row["cache"]])
                axis.text(x, ratio + 0.1, f"{row['context']:,}", ha="center", fontsize=8)
                axis.text(x, 0.15, row["cache"], ha="center", fontsize=8, color="white")
    axis.axhline(1, color="#7f7f7f", lw=1, ls=":")
    axis.set_xticks(range(len(limits)), [f"{limit / 1e9:.1f} GB" for limit in limits])
    axis.grid(False, axis="x")
    label(axis, "longest sequence, in tokens", "memory, weights included", "times bfloat16", False)
