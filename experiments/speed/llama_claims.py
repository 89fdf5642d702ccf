"""What the rows of `llama_speed` say about our aims."""

import itertools
from collections.abc import Iterator, Sequence

from experiments.harness.experiment import Claim, Row, Verdict, distinct, where
from experiments.harness.statistics import met

FULL = 16
_SPEED = {"32x4096": 1.5, "8x32768": 2.2, "largest4096": 3.0}
_MODEL = "llama-3-8b"  # of the aims, and of rows that name none
_ROOFLINE, _LATENCY = 0.8, 1.02
_QUOTED = 60 / 8  # "from 8K to 60K tokens", said of 4 bits in 24 GB


def model_of(row: Row) -> str:
    """The model of a row."""
    return row.get("model", _MODEL)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """A claim for each aim whose rows are there."""
    others = [row for row in rows if model_of(row) != _MODEL]
    rows = [row for row in rows if model_of(row) == _MODEL]
    return [
        *_speed(rows), *_latency(rows), *_roofline(rows), *_longest(rows), *_greedy(rows),
        *_others(rows, (*_SPEED, "1x4096", "longest")),
        *(c for m in distinct(others, "model") for c in _others(where(others, model=m), (), m)),
    ]  # fmt: skip


def _so(good: bool) -> Verdict:
    return "holds" if good else "does not hold"


def _pair(rows: Sequence[Row], case: str, bits: int = 4) -> tuple[Row, Row] | None:
    """The row of a case and its baseline."""
    found = [where(rows, case=case, bits_k=b) for b in (bits, FULL)]
    return (found[0][0], found[1][0]) if all(found) else None


def _speed(rows: Sequence[Row]) -> Iterator[Claim]:
    for (case, least), bits in itertools.product(_SPEED.items(), (4, 3, 2)):
        if pair := _pair(rows, case, bits):
            ours, base = pair
            ratio = ours["tokens_per_second"] / base["tokens_per_second"]
            fastest = [row["tokens_per_second"] / row["fraction_of_roofline"] for row in pair]
            yield Claim(
                "our aim" if bits == 4 else "our question",
                f"{case}, {bits} bits: at least {least} times the tokens per second of bfloat16",
                f"{ratio:.2f} times: {ours['tokens_per_second']:,.0f} at batch {ours['batch']}, "
                f"{base['tokens_per_second']:,.0f} at batch {base['batch']}; "
                f"the bytes of weights and cache allow {fastest[0] / fastest[1]:.2f}",
                met(ratio >= least) if bits == 4 else _so(ratio >= least),
            )


def _latency(rows: Sequence[Row]) -> Iterator[Claim]:
    if pair := _pair(rows, "1x4096"):
        ours, base = (row["milliseconds_per_step"] for row in pair)
        yield Claim(
            "our aim",
            f"1 x 4096, 4 bits: a token takes at most {_LATENCY} times bfloat16's time",
            f"{ours / base:.3f} times: {ours:.3f} ms against {base:.3f} ms",
            met(ours <= _LATENCY * base),
        )


def _roofline(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in where(rows, case="8x32768", bits_k=4):
        share = row["fraction_of_roofline"]
        yield Claim(
            "our aim",
            f"8 x 32768, 4 bits: a step at {_ROOFLINE:.0%} or more of the roofline",
            f"{share:.1%} of {row['copy_gigabytes_per_second']:.0f} GB/s",
            met(share >= _ROOFLINE),
        )


def _others(rows: Sequence[Row], known: Sequence[str], model: str = "") -> Iterator[Claim]:
    for case in distinct(rows, "case"):
        if case not in known and (pair := _pair(rows, case)):
            ours, base = (row["tokens_per_second"] for row in pair)
            yield Claim(
                "our question",
                f"{model + ' ' if model else ''}{case}, 4 bits: no slower than bfloat16",
                f"{ours / base:.2f} times the tokens per second",
                _so(ours >= base),
            )


def _longest(rows: Sequence[Row]) -> Iterator[Claim]:
    for limit in distinct(where(rows, case="longest"), "memory_limit"):
        found = {r["bits_k"]: r["context"] for r in where(rows, case="longest", memory_limit=limit)}
        if FULL in found and 4 in found:
            each = ", ".join(f"{bits} bits {found[bits]:,}" for bits in sorted(found)[::-1])
            ratio = found[4] / found[FULL]
            yield Claim(
                "often quoted",
                f'"8K -> 60K": {_QUOTED:g} times the context at 4 bits in {limit / 1e9:.1f} GB',
                f"{ratio:.2f} times, each allocated and decoded: {each} tokens",
                "holds" if ratio >= _QUOTED else "not reproducible",
            )


def _greedy(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in where(rows, case="greedy"):
        same, statement = row["tokens_equal"], "kernel and definition generate the same tokens"
        measured = f"{same} of {row['tokens']}"
        near_tie = False
        if "gap_xla" in row:
            near_tie = min(row["gap_xla"], row["gap_pallas"]) <= 2 * row["logit_difference"]
            measured += (
                f", then the best token leads by {row['gap_xla']:.4f} (definition) and "
                f"{row['gap_pallas']:.4f} (kernel) where the logits differ by up to "
                f"{row['logit_difference']:.4f}"
            )
        yield Claim(
            "our aim",
            f"SmolLM2 in {row['dtype']}, greedy, {row['bits_k']} bits: {statement}, "
            "or part at a near-tie",
            measured,
            met(same == row["tokens"] or near_tie),
        )
