"""What the rows of `pytorch_greedy` say about our aims."""

from collections.abc import Iterator, Sequence

from experiments.harness import results
from experiments.harness.experiment import AIM, Claim, Row, where
from experiments.harness.statistics import SIGMAS, met

_TEXTS = 8192
"""Tokens of the texts of which `fidelity` has rows."""
_SETTINGS = {
    "lossless": "K4 V4 trellis w128 pre-RoPE",
    "balanced": "K3 V3 trellis w128 pre-RoPE",
    "compact": "K3 V2 trellis w128 pre-RoPE",
    "max": "K2 V2 trellis w128 pre-RoPE",
}


def claims(rows: Sequence[Row]) -> list[Claim]:
    """A claim for each row."""
    return [*_greedy(where(rows, part="greedy")), *_perplexity(where(rows, part="perplexity"))]


def _greedy(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in rows:
        same, count = row["tokens_equal"], row["tokens"]
        measured = f"{row['tokens_agreeing']} of {count}"
        near_tie = same == count
        if "gap_torch" in row:
            near_tie = row["largest_gap_over_difference"] <= 2
            measured += (
                f"; the first other one, number {same}, where the best token leads by "
                f"{row['gap_torch']:.4f} (torch) and {row['gap_jax']:.4f} (ours), and the logits "
                f"differ by up to {row['logit_difference']:.4f}"
            )
        yield Claim(
            AIM,
            f"SmolLM2 in {row['dtype']}, {row['preset']}: transformers' generate chooses the "
            "tokens of our own decoder, or another at a near-tie",
            measured,
            met(near_tie),
            topic="under PyTorch, greedy tokens of SmolLM2 are our own decoder's, or near-ties",
            short=f"{row['dtype']}, {row['preset']}: {row['tokens_agreeing']} of {count}",
        )


def _perplexity(rows: Sequence[Row]) -> Iterator[Claim]:
    held = results.read(results.COMMITTED / "fidelity").rows
    for row in where(rows, context=_TEXTS):
        setting = _SETTINGS[row["preset"]]
        found = where(held, preset=setting, kind="centring", text="all", context=_TEXTS)
        for report in where(found, model="smollm2-135m"):
            difference = abs(row["perplexity_change"] - report["perplexity_change"])
            yield Claim(
                AIM,
                f"SmolLM2, {row['preset']}: perplexity under PyTorch is that of fidelity",
                f"{row['perplexity']:.4f} against {report['perplexity']:.4f}; "
                f"{row['perplexity_change']:+.3%} against {report['perplexity_change']:+.3%} "
                f"± {report['perplexity_change_se']:.3%} by the cache",
                met(difference <= SIGMAS * report["perplexity_change_se"]),
                topic="under PyTorch, perplexity of SmolLM2 is that of fidelity",
                short=f"{row['preset']} {row['perplexity_change']:+.2%}, "
                f"{report['perplexity_change']:+.2%} there",
            )
