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
_WHEN = {"ratio": "at the texts' length", "ratio_64k": "at 65,536 tokens"}


def calibrated_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Of one model, file by file: aims, then uniform bits on texts unlike those that it read."""
    judged = {
        "test texts": where(rows, kind="calibrated", text="all"),
        "code alone": where(rows, kind="calibrated", text="code"),
        "German": where(rows, kind="language", text="all"),
    }
    files = dict.fromkeys(_file(row) for row in judged["test texts"])
    for file in filter(None, files):
        yield from _aims(file, [row for row in judged["test texts"] if _file(row) == file])
        for texts, found in judged.items():
            yield from _equal_bytes(file, found, texts)


def _file(row: Row) -> str:
    """Of a calibrated preset; nothing of a uniform one."""
    return row["preset"].partition(" by ")[2]


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


def _equal_bytes(file: str, rows: Sequence[Row], texts: str) -> Iterator[Claim]:
    """Beside the uniform preset that has no fewer bytes at 65,536 tokens, its mean exact."""
    size = "bytes_per_token_64k"
    for row in rows:
        larger = [one for one in rows if not _file(one) and one[size] >= row[size]]
        if _file(row) != file or not larger:
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
