"""What the rows of `pytorch_greedy` say about our aims."""

from collections.abc import Iterator, Sequence

from experiments.harness import results
from experiments.harness.experiment import AIM, Claim, Row, where
from experiments.harness.statistics import SIGMAS, met

_NAMES = {"smollm2-135m": "SmolLM2", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B"}
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
            f"{_name(row)} in {row['dtype']}, {row['preset']}: transformers' generate chooses the "
            "tokens of our own decoder, or another at a near-tie",
            measured,
            met(near_tie),
            topic=f"under PyTorch, greedy tokens of {_name(row)} are our own decoder's, "
            "or near-ties",
            short=f"{row['dtype']}, {row['preset']}: {row['tokens_agreeing']} of {count}",
        )


def _perplexity(rows: Sequence[Row]) -> Iterator[Claim]:
    held = results.read(results.COMMITTED / "fidelity").rows
    for row in rows:
        setting, context = _SETTINGS[row["preset"]], row["context"]
        found = where(held, preset=setting, kind="centring", text="all", context=context)
        for report in where(found, model=row["model"]):
            difference = abs(row["perplexity_change"] - report["perplexity_change"])
            yield Claim(
                AIM,
                f"{_name(row)}, {row['preset']}: perplexity under PyTorch is that of fidelity",
                f"{row['perplexity']:.4f} against {report['perplexity']:.4f}; "
                f"{row['perplexity_change']:+.3%} against {report['perplexity_change']:+.3%} "
                f"± {report['perplexity_change_se']:.3%} by the cache",
                met(difference <= SIGMAS * report["perplexity_change_se"]),
                topic=f"under PyTorch, perplexity of {_name(row)} is that of fidelity",
                short=f"{row['preset']} {row['perplexity_change']:+.2%}, "
                f"{report['perplexity_change']:+.2%} there",
            )


def _name(row: Row) -> str:
    return _NAMES[row["model"]]
