"""What the rows of `vllm_speed` say: memory, speed, the same tokens, and an answer over HTTP."""

from collections.abc import Iterator, Sequence

from experiments.harness.experiment import AIM, QUESTION, Claim, Row, Verdict, where
from experiments.harness.statistics import met

OURS, THEIRS, IN_TREE = "CUSTOM", "TRITON_ATTN", "turboquant_4bit_nc"
TIMES = 3.6
"""The aim: as many times the tokens of bfloat16 in the same bytes."""
NEAR = 0.01
"""Of two tokens' log probabilities, the difference below which they are a near-tie."""
LONG = 32768
"""Tokens from which on our backend has to be the fastest: an aim."""
KEPT = 0.9
"""Of the speed without a window, what is asked of that with one."""


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Ours beside the others."""
    return [
        *_speed_claims(rows),
        *_window_claims(rows),
        *_token_claims(rows),
        *_device_claims(rows),
        *_server_claims(rows),
    ]


def _speed_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    timed = [row for row in rows if "tokens_per_second" in row]
    for ours in where(timed, backend=OURS):
        case = {name: ours[name] for name in ("batch", "context")}
        name = f"{ours['batch']} x {ours['context']}{_window(ours)}"
        for other in (row for row in where(timed, **case) if row["backend"] != OURS):
            times = ours["tokens_per_second"] / other["tokens_per_second"]
            yield Claim(
                AIM if ours["context"] >= LONG else QUESTION,
                f"vLLM, {name}: faster than {other['backend']}",
                f"{ours['tokens_per_second']:.0f} tokens a second against "
                f"{other['tokens_per_second']:.0f}, {times:.2f} times",
                met(times > 1) if ours["context"] >= LONG else _held(times > 1),
            )
    pairs = [(x, y) for x in where(timed, backend=OURS) for y in where(timed, backend=THEIRS)]
    for ours, other in pairs[:1]:
        times = ours["kv_tokens"] / other["kv_tokens"]
        yield Claim(
            AIM,
            f"vLLM: at least {TIMES} times the tokens of bfloat16 in the same bytes",
            f"{ours['kv_tokens']:,} against {other['kv_tokens']:,}, {times:.2f} times",
            met(times >= TIMES),
        )


def _window_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    timed = [row for row in where(rows, backend=OURS) if "tokens_per_second" in row]
    for row in (row for row in timed if row.get("window")):
        same = where(timed, batch=row["batch"], context=row["context"])
        for plain in (other for other in same if not other.get("window")):
            share = row["tokens_per_second"] / plain["tokens_per_second"]
            yield Claim(
                QUESTION,
                f"vLLM, {row['batch']} x {row['context']}{_window(row)}: at least {KEPT} of the "
                "speed without",
                f"{row['tokens_per_second']:.0f} tokens a second against "
                f"{plain['tokens_per_second']:.0f}, {share:.2f}",
                _held(share >= KEPT),
            )


def _token_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in where(rows, part="tokens", backend=OURS):
        bits = f"vLLM, {row['bits']} bits{_window(row)}"
        if row.get("run") == "first" and row["bits"] == 8:
            same, lead = row["equal"] == row["tokens"], row.get("lead", 0.0)
            yield Claim(
                QUESTION,
                f"{bits}: greedy tokens are those of vLLM's own attention, or part at a near-tie, "
                f"where its token leads by less than {NEAR} in log probability",
                f"{row['equal']} of {row['tokens']} before the first of each prompt that differs"
                + ("" if same else f", where it leads by {lead:.1g} at most"),
                _held(lead < NEAR),
            )
        elif row.get("run", "first") != "first":
            yield Claim(
                QUESTION,
                f"{bits}: the same tokens, {row['run']}",
                f"{row['equal_first']} of {row['tokens']} before the first that differs"
                + (
                    f", where it leads by {lead:.1g} at most"
                    if (lead := row.get("lead_first"))
                    else ""
                ),
                _held(row["equal_first"] == row["tokens"]),
            )


def _device_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in where(rows, part="tensor", devices=2):
        if "run" in row:
            lead = row.get("lead")
            yield Claim(
                QUESTION,
                f"vLLM, {row['bits']} bits: two GPUs give the tokens of one, {row['run']}",
                f"{row['equal']} of {row['tokens']} before the first that differs"
                + (f", where it leads by {lead:.1g} at most" if lead else ""),
                _held(row["equal"] == row["tokens"]),
            )


def _server_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in where(rows, part="serve"):
        compiled = ", the model compiled by torch" if row["compiled"] else ""
        yield Claim(
            QUESTION,
            f"vLLM: `vllm serve` answers over HTTP{compiled}",
            row.get("note")
            or f"up after {row['start_seconds']:.0f} s, {row['tokens']} tokens in "
            f"{row['seconds']:.1f} s",
            _held("note" not in row),
        )


def _window(row: Row) -> str:
    return f", a window of {row['window']}" if row.get("window") else ""


def _held(yes: bool) -> Verdict:
    return "holds" if yes else "does not hold"
