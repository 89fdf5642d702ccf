"""What rows of `fidelity` say of calibrated presets: aims, and uniform bits of their bytes."""

from collections.abc import Iterator, Sequence

from experiments.fidelity.choices import describe
from experiments.harness.experiment import QUESTION, Claim, Row, where
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


def calibrated_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Of one model, file by file: aims, then uniform bits on texts unlike those that it read."""
    judged = {
        "test texts": where(rows, kind="calibrated", text="all"),
        "code alone": where(rows, kind="calibrated", text="code"),
        "German": where(rows, kind="language", text="all"),
    }
    peers = where(rows, kind="peer", text="all")
    files = dict.fromkeys(_file(row) for row in judged["test texts"])
    for file in filter(None, files):
        own = [row for row in judged["test texts"] if _file(row) == file]
        presets = [row for row in own if not _window(row)]
        yield from _aims(file, presets)
        yield from _perplexity(file, presets)
        for texts, found in judged.items():
            yield from _equal_bytes(file, found, texts)
        yield from _windows(file, own)
        yield from _peers(file, presets, peers)


def _file(row: Row) -> str:
    """Of a calibrated preset; nothing of a uniform one."""
    return row["preset"].partition(" by ")[2].partition(" ")[0]


def _window(row: Row) -> str:
    """Of a calibrated preset with another window than its own."""
    return row["preset"].partition(" by ")[2].partition(" ")[2]


def _aims(file: str, rows: Sequence[Row]) -> Iterator[Claim]:
    for least, column, limit in AIMS.get(rows[0]["model"], ()):
        reach = [row for row in rows if row[column] >= least]
        if not reach:
            continue
        row = min(reach, key=lambda row: row[column])  # the one of the most bytes
        yield Claim(
            "our aim",
            f"{row['model']}, calibrated ({file}), at {least:g}x and more, true bytes "
            f"{_WHEN[column]}: a KL divergence of at most {limit:g} nats",
            describe(row),
            of_aim(is_below(row["kl"], row["kl_se"], limit)),
            topic=f"{row['model']}, calibrated ({file}): KL",
            short=f"{least:g}x {_WHEN[column]}, {limit:g}: {row['kl']:.4f}",
        )


def _perplexity(file: str, rows: Sequence[Row]) -> Iterator[Claim]:
    if rows[0]["model"] not in PERPLEXITY:
        return
    least, column, limit = PERPLEXITY[rows[0]["model"]]
    if not (reach := [row for row in rows if row[column] >= least]):
        return
    row = min(reach, key=lambda row: row[column])
    yield Claim(
        "our aim",
        f"{row['model']}, calibrated ({file}), at {least:g}x and more, true bytes "
        f"{_WHEN[column]}: perplexity up by at most {limit:.1%}",
        describe(row),
        of_aim(is_below(row["perplexity_change"], row["perplexity_change_se"], limit)),
    )


def _windows(file: str, rows: Sequence[Row]) -> Iterator[Claim]:
    """Other windows in the same bytes at 65,536 tokens."""
    found = {row["preset"]: row for row in rows}
    for row in rows:
        if _window(row):
            usual = found[row["preset"].removesuffix(f" {_window(row)}")]
            yield Claim(
                QUESTION,
                f"{row['model']}: in the bytes of {usual['preset']} at 65,536 tokens a window of "
                f"{row['window']} loses less than one of {usual['window']}",
                f"{describe(row)}; {describe(usual)}",
                is_less(row, usual),
            )


def _peers(file: str, rows: Sequence[Row], peers: Sequence[Row]) -> Iterator[Claim]:
    """Of the presets the largest that is no larger than the peer at 65,536 tokens."""
    size = "bytes_per_token_64k"
    for peer in peers:
        if not (smaller := [row for row in rows if row[size] <= peer[size]]):
            continue
        row = max(smaller, key=lambda row: row[size])
        yield Claim(
            "our aim",
            f"{row['model']}, calibrated ({file}): less KL than {peer['preset']} at no more bytes "
            f"({peer['ratio_64k']:.2f}x at 64K)",
            f"{describe(row)}; {describe(peer)}",
            of_aim(is_less(row, peer)),
            topic=f"{row['model']}, calibrated ({file}): less KL than peers at no more bytes at "
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
            f"{row['model']}, {texts}: less KL with {row['preset']} than with uniform bits of no "
            "fewer bytes, keys centred before their rotary embedding",
            f"{describe(row)}; {describe(other)}",
            is_less(row, other),
            topic=f"{row['model']}, calibrated ({file}), {texts}: less KL than uniform bits of no "
            "fewer bytes",
            short=f"{row['kl']:.4f}, uniform {other['kl']:.4f}",
        )
