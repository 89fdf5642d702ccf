"""What rows of `fidelity` say of calibrated presets: aims, and uniform bits of their bytes."""

from collections.abc import Iterator, Sequence

from experiments.fidelity.choices import describe
from experiments.harness.experiment import QUESTION, Claim, Row, distinct, where
from experiments.harness.statistics import is_below, is_less, of_aim

# by model: least ratio, the column it is of, most KL in nats a token
AIMS = {
    "smollm2-135m": (
        (3.5, "ratio", 0.0015),
        (4.8, "ratio_64k", 0.0025),
        (5.7, "ratio_64k", 0.004),
        (7.0, "ratio_64k", 0.008),
        (7.0, "ratio_64k", 0.005),
    ),
    "qwen2.5-coder-0.5b": (
        (3.5, "ratio", 0.005),
        (4.8, "ratio_64k", 0.010),
        (5.7, "ratio_64k", 0.015),
        (7.0, "ratio_64k", 0.020),
        (7.0, "ratio_64k", 0.015),
    ),
}
PERPLEXITY = {"smollm2-135m": (7.0, "ratio_64k", 0.004)}
"""By model: least ratio, its column, and the most that perplexity may rise."""
_WHEN = {"ratio": "at the texts' length", "ratio_64k": "at 65,536 tokens"}


ALONE = "-prose"
"""Ends the name of a file from texts of one kind, which is asked only how it does on others."""


def calibrated_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Of one model, for each length of its texts."""
    kinds = "calibrated", "calibrating", "language", "peer"
    found = [row for kind in kinds for row in where(rows, kind=kind, text="all")]
    lengths = distinct([row for row in found if row["kind"] != "peer"], "context")
    for length in lengths:
        here = where(rows, context=length)
        who = f"{rows[0]['model']}, {length:,} tokens" if len(lengths) > 1 else rows[0]["model"]
        yield from _of_length([{**row, "who": who} for row in here])


def _of_length(rows: Sequence[Row]) -> Iterator[Claim]:
    """Windows, aims, peers, then file by file uniform bits."""
    judged = {
        "test texts": where(rows, kind="calibrated", text="all"),
        "code alone": where(rows, kind="calibrated", text="code"),
        "German": where(rows, kind="language", text="all"),
    }
    yield from _windows(judged["test texts"], "test texts")
    yield from _windows(where(rows, kind="calibrating", text="all"), "the texts that choose")
    files = dict.fromkeys(filter(None, map(_file, judged["test texts"])))
    presets = [
        row
        for row in judged["test texts"]
        if _file(row) and not _file(row).endswith(ALONE) and not _window(row)
    ]
    yield from _aims(presets)
    yield from _perplexity(presets)
    yield from _peers(presets, where(rows, kind="peer", text="all"))
    for file in files:
        for texts, found in judged.items():
            yield from _equal_bytes(file, found, texts)


def _file(row: Row) -> str:
    """Of a calibrated preset; nothing of a uniform one."""
    return row["preset"].partition(" by ")[2].partition(" ")[0]


def _window(row: Row) -> str:
    """Of a calibrated preset with another window than its own."""
    return row["preset"].partition(" by ")[2].partition(" ")[2]


def _largest(rows: Sequence[Row], column: str, least: float) -> Row | None:
    """Of the most bytes among those that are at least so many times smaller."""
    reach = [row for row in rows if row[column] >= least]
    return min(reach, key=lambda row: row[column], default=None)


def _aims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Of the presets of all files the largest that is small enough."""
    for least, column, limit in AIMS.get(rows[0]["model"], ()) if rows else ():
        if (row := _largest(rows, column, least)) is None:
            continue
        yield Claim(
            "our aim",
            f"{row['who']}, calibrated, at {least:g}x and more, true bytes {_WHEN[column]}: "
            f"a KL divergence of at most {limit:g} nats",
            describe(row),
            of_aim(is_below(row["kl"], row["kl_se"], limit)),
            topic=f"{row['who']}, calibrated: KL",
            short=f"{least:g}x {_WHEN[column]}, {limit:g}: {row['kl']:.4f}",
        )


def _perplexity(rows: Sequence[Row]) -> Iterator[Claim]:
    if not rows or rows[0]["model"] not in PERPLEXITY:
        return
    least, column, limit = PERPLEXITY[rows[0]["model"]]
    if (row := _largest(rows, column, least)) is None:
        return
    yield Claim(
        "our aim",
        f"{row['who']}, calibrated, at {least:g}x and more, true bytes {_WHEN[column]}: "
        f"perplexity up by at most {limit:.1%}",
        describe(row),
        of_aim(is_below(row["perplexity_change"], row["perplexity_change_se"], limit)),
    )


def _windows(rows: Sequence[Row], texts: str) -> Iterator[Claim]:
    """Other windows in the same bytes at 65,536 tokens."""
    found = {row["preset"]: row for row in rows}
    for row in rows:
        usual = found.get(row["preset"].removesuffix(f" {_window(row)}"))
        if _window(row) and usual is not None:
            first, second = sorted((row, usual), key=lambda one: -one["window"])
            yield Claim(
                QUESTION,
                f"{row['who']}, {texts}: in the bytes of {usual['preset']} at 65,536 tokens a "
                f"window of {first['window']} loses less than one of {second['window']}",
                f"{describe(first)}; {describe(second)}",
                is_less(first, second),
            )


def _peers(rows: Sequence[Row], peers: Sequence[Row]) -> Iterator[Claim]:
    """Of the presets the largest that is no larger than the peer at 65,536 tokens."""
    size = "bytes_per_token_64k"
    for peer in peers:
        if not (smaller := [row for row in rows if row[size] <= peer[size]]):
            continue
        row = max(smaller, key=lambda row: row[size])
        yield Claim(
            "our aim",
            f"{row['who']}, calibrated: less KL than {peer['preset']} at no more bytes "
            f"({peer['ratio_64k']:.2f}x at 64K)",
            f"{describe(row)}; {describe(peer)}",
            of_aim(is_less(row, peer)),
            topic=f"{row['who']}, calibrated: less KL than peers at no more bytes at "
            "65,536 tokens; KL over the peer's",
            short=f"{row['kl'] / peer['kl']:.3f} ({peer['preset']})",
        )


def _equal_bytes(file: str, rows: Sequence[Row], texts: str) -> Iterator[Claim]:
    """Beside the uniform preset that has no fewer bytes at 65,536 tokens, its mean exact."""
    size = "bytes_per_token_64k"
    for row in rows:
        larger = [one for one in rows if not _file(one) and one[size] >= row[size]]
        if _file(row) != file or _window(row) or not larger:
            continue
        other = min(larger, key=lambda one: one[size])
        yield Claim(
            QUESTION,
            f"{row['who']}, {texts}: less KL with {row['preset']} than with uniform bits of no "
            "fewer bytes, keys centred before their rotary embedding",
            f"{describe(row)}; {describe(other)}",
            is_less(row, other),
            topic=f"{row['who']}, calibrated ({file}), {texts}: less KL than uniform bits of no "
            "fewer bytes",
            short=f"{row['kl']:.4f}, uniform {other['kl']:.4f}",
        )
