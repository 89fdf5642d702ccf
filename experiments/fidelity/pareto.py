"""Loss against bytes: a curve for each family of caches, named at its end."""

from collections.abc import Sequence

from experiments.harness import plotting
from experiments.harness.experiment import Row, where
from experiments.harness.plotting import Axes

_OWN = "w128 sinks4"  # a peer's format within our window and sinks
_PEERS = {"KIVI": plotting.KIVI, "vLLM": plotting.VLLM, "per-token": plotting.PER_TOKEN}


def pareto(axis: Axes, rows: Sequence[Row]) -> None:
    """The test texts, or the calibration texts where these were not reached."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.5)
    shown = [r for r in rows if r["kind"] in ("chosen", "peer") and r["text"] == "all"]
    shown = shown or where(rows, kind="candidate", text="all")
    families: dict[str, list[Row]] = {}
    for row in shown:
        families.setdefault(_family(row), []).append(row)
    for name, members in families.items():
        members.sort(key=lambda row: row["bytes_per_token"])
        colour, line = _style(name)
        xs, ys, errors = (
            [row[key] for row in members] for key in ("bytes_per_token", "kl", "kl_se")
        )
        axis.errorbar(xs, ys, errors, fmt=line, ms=5, lw=1.5, color=colour, label=name)
        for row in members:
            words = str(row["bits_k"]) if row["bits_k"] == row["bits_v"] else "3, 2"
            axis.annotate(
                words, (row["bytes_per_token"], row["kl"]), (4, 4), textcoords="offset points",
                fontsize=7, color=colour,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter("{x:,.0f}")
    if any(row["kl"] > 0 for row in shown):  # all of few tokens may gain by chance
        axis.set_yscale("log")
    x = "bytes a token at the texts' length, every byte counted; beside a point its bits"
    plotting.label(axis, "loss against size, a curve for each family", x, "KL, nats a token")
    axis.legend(fontsize=8, frameon=False, ncols=2, handlelength=3.5)


def _family(row: Row) -> str:
    """What the caches of a curve have in common; along it only the bits change."""
    name = row["preset"]
    if row["kind"] == "peer":
        first = next((peer for peer in _PEERS if name.startswith(peer)), name)
        if name.endswith("every layer"):
            return f"{first}, every layer"
        return f"{first}, our window and sinks" if name.endswith(_OWN) else first
    if "w0" in name.split():
        return "the paper's: no window, sinks or centring"
    mean = "mean before RoPE" if name.endswith("pre-RoPE") else "mean of stored keys"
    if "scale8" in name:
        return f"8-bit scales, blocks of 16, {mean}"
    return f"{row['code']}, {mean}"


def _style(family: str) -> tuple[str, str]:
    """Colour and line: dashed is the same with the mean of stored keys, or within our window."""
    first = family.split(",")[0].removesuffix(" int4").removesuffix(" int2")
    colours = _PEERS | {"fp8": plotting.FP8, "trellis": plotting.OURS, "scalar": plotting.SCALAR}
    colours |= {"8-bit scales": plotting.COLOURS[7]}
    dashed = "stored" in family or "our window" in family
    return colours.get(first, plotting.PLAIN), "o--" if dashed else "o-"
