"""What the rows of `fidelity` say: targets, peers, and the worth of every property."""

from collections.abc import Iterator, Sequence

from experiments.fidelity.calibrated_claims import calibrated_claims
from experiments.fidelity.choices import best, describe
from experiments.harness.experiment import QUESTION, Claim, Row, Verdict, distinct, where
from experiments.harness.statistics import is_below, is_less, of_aim

# ratio, column, limit, what is asked; then the aim beyond the target
TARGETS = (
    (3.5, "kl", 0.003, "a KL divergence of at most 0.003 nats"),
    (4.8, "perplexity_change", 0.007, "perplexity up by at most 0.7 %"),
    (4.8, "perplexity_change", 0.003, "perplexity up by at most 0.3 %"),
    (5.7, "perplexity_change", 0.010, "perplexity up by at most 1 %"),
    (5.7, "perplexity_change", 0.005, "perplexity up by at most 0.5 %"),
    (7.0, "perplexity_change", 0.010, "perplexity up by at most 1 %"),
)
LENGTHS = {"ratio": "at the texts' length", "ratio_64k": "at 65,536 tokens"}


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Everything that can be said from whatever rows there are, model by model."""
    judges = _targets, _peers, _pairs, _noise, _centring, _lengths, calibrated_claims
    models = [where(rows, model=model) for model in distinct(rows, "model")]
    return [claim for of_model in models for judge in judges for claim in judge(of_model)]


def _targets(rows: Sequence[Row]) -> Iterator[Claim]:
    """For each target the setting that the calibration texts choose, judged on the test texts.

    Where these were not reached, what is missed on the texts that chose is missed; nothing holds.
    """
    calibrated = where(rows, kind="candidate", text="all")
    tested = {row["preset"]: row for row in where(rows, kind="chosen", text="all")}
    for ratio, when in LENGTHS.items():
        for target, column, limit, words in TARGETS:
            choices = {
                owner: row["preset"]
                for owner in ("ours", "any")
                if (row := best(calibrated, ratio, target, owner == "ours"))
            }
            for owner, name in choices.items():
                if owner == "any" and name == choices.get("ours"):
                    continue
                row = tested.get(name) or next(r for r in calibrated if r["preset"] == name)
                verdict = is_below(row[column], row[f"{column}_se"], limit)
                on = "test texts"
                if row["kind"] == "candidate":
                    on = "only calibration texts were measured"
                    verdict = "undecided" if verdict == "holds" else verdict
                whose = "" if owner == "ours" else ", in a cache that the library does not have"
                yield Claim(
                    "our aim",
                    f"at {target:g}x and more, true bytes {when}: {words}{whose} ({on})",
                    describe(row),
                    of_aim(verdict),
                    topic=f"true bytes {when}{whose}",
                    short=f"{target:g}x, {words}: "
                    + (f"{row[column]:.4f}" if column == "kl" else f"{row[column]:+.2%}"),
                )


def _peers(rows: Sequence[Row]) -> Iterator[Claim]:
    """Of our remedied settings the largest that is no larger than the peer at 65,536 tokens."""
    ours = where(rows, kind="chosen", text="all", centred=1)
    for peer in where(rows, kind="peer", text="all"):
        smaller = [row for row in ours if row["bytes_per_token_64k"] <= peer["bytes_per_token_64k"]]
        if not smaller:
            continue
        row = max(smaller, key=lambda row: (row["bytes_per_token_64k"], "trellis" in row["code"]))
        yield Claim(
            "our aim",
            f"less KL than {peer['preset']} at no more bytes ({peer['ratio_64k']:.2f}x at 64K), "
            f"{row['tokens']:,} tokens in texts of {row['context']:,}",
            f"{row['preset']} ({row['ratio_64k']:.2f}x): {row['kl']:.4f} ± {row['kl_se']:.4f}, the "
            f"peer {peer['kl']:.4f} ± {peer['kl_se']:.4f}; perplexity "
            f"{row['perplexity_change']:+.2%} and {peer['perplexity_change']:+.2%}",
            is_less(row, peer),
            topic="less KL than peers at no more bytes at 65,536 tokens; KL over the peer's",
            short=f"{row['kl'] / peer['kl']:.2f} ({peer['preset']})",
        )


BARE = "K4 V4 w0 sinks0 uncentred"
"""The paper's cache at 4 bits, of which it says more than of its 3.5; all others are ours."""

_NEUTRAL = {
    BARE: "4 bits are quality neutral, without window, sinks and centring",
    "K4 V4 w64": "4 bits are quality neutral, with a window of 64, sinks and centring",
    "K3 V3 trellis w128": "3 bits are quality neutral, trellis, with a window of 128",
    "K3 V2 trellis w128": "2.5 bits lose little, trellis, with a window of 128",
    "K2 V2 trellis w128": "2 bits lose little, trellis, with a window of 128",
}

# source, statement, better preset, worse preset: less KL on the same texts
_PAIRS = (
    (QUESTION, "a longer window pays", "K2 V2 trellis w256", "K2 V2 trellis w64"),
    (
        QUESTION,
        "a longer window pays at 3 and 2 bits",
        "K3 V2 trellis w256",
        "K3 V2 trellis w64",
    ),
    (
        QUESTION,
        "at 5.7x at this length, a bit more of keys is worth more than a window of 256",
        "K3 V2 trellis scale8 w64 block16",
        "K2 V2 trellis w256",
    ),
    (QUESTION, "a recent window pays", "K3 V3 w64", "K3 V3 w0"),
    (QUESTION, "sinks pay", "K3 V3 w64", "K3 V3 w64 sinks0"),
    (QUESTION, "centred keys pay", "K3 V3 w64", "K3 V3 w64 uncentred"),
    (
        QUESTION,
        "keys centred before their rotary embedding pay at 3 bits",
        "K3 V3 w64 pre-RoPE",
        "K3 V3 w64",
    ),
    (
        QUESTION,
        "keys centred before their rotary embedding pay at 2 bits",
        "K2 V2 trellis w128 pre-RoPE",
        "K2 V2 trellis w128",
    ),
    (
        QUESTION,
        "at equal bytes the bit belongs to the keys",
        "K3 V2 trellis w128",
        "K2 V3 trellis w128",
    ),
    (
        QUESTION,
        "at equal bytes the bit belongs to the keys, centred before their rotary embedding",
        "K3 V2 trellis w128 pre-RoPE",
        "K2 V3 trellis w128 pre-RoPE",
    ),
    (QUESTION, "the trellis pays at 3 bits", "K3 V3 trellis w64", "K3 V3 w64"),
    (QUESTION, "the trellis pays at 2 bits", "K2 V2 trellis w64", "K2 V2 w64"),
    (QUESTION, "values need fewer bits than keys", "K3 V2 w64", "K2 V3 w64"),
    (QUESTION, "a rotation pays at 3 bits", "K3 V3 w64", "K3 V3 identity w64"),
    (QUESTION, "Haar is better than a random Hadamard", "K3 V3 haar w64", "K3 V3 w64"),
    ("EDEN", "least squares beats the norm at 2 bits", "K2 V2 w64", "K2 V2 norm w64"),
    ("EDEN", "least squares beats the unbiased scale at 2 bits", "K2 V2 w64", "K2 V2 unbiased w64"),
    (QUESTION, "Lloyd-Max beats uniform levels", "K3 V3 w64", "K3 V3 uniform w64"),
)


def _pairs(rows: Sequence[Row]) -> Iterator[Claim]:
    """What lies within 1 %, then pairs of settings, from texts of the same kind."""
    for kind in ("curve", "candidate", "chosen"):
        found = {row["preset"]: row for row in where(rows, kind=kind, text="all")}
        for name, words in _NEUTRAL.items():
            if row := found.get(name):
                yield Claim(
                    "TurboQuant, section 4.3" if name == BARE else QUESTION,
                    f"{words} (perplexity within 1 %; {row['tokens']:,} tokens in texts of "
                    f"{row['context']:,})",
                    describe(row),
                    is_below(row["perplexity_change"], row["perplexity_change_se"], 0.01),
                )
        for source, statement, better, worse in _PAIRS:
            if better in found and worse in found:
                yield _less(source, statement, found[better], found[worse])
        yield from _same(found)


def _less(source: str, statement: str, better: Row, worse: Row) -> Claim:
    return Claim(
        source,
        f"{statement}: less KL with {better['preset']} than with {worse['preset']}",
        f"{better['kl']:.4f} ± {better['kl_se']:.4f} and {worse['kl']:.4f} ± {worse['kl_se']:.4f}",
        is_less(better, worse),
    )


def _same(curve: dict[str, Row]) -> Iterator[Claim]:
    for bits in (2, 3):
        name = f"K{bits} V{bits} trellis"
        short, usual = curve.get(f"{name} scale8 w64"), curve.get(f"{name} w64")
        if not (short and usual):
            continue
        error = (short["kl_se"] ** 2 + usual["kl_se"] ** 2) ** 0.5
        yield Claim(
            QUESTION,
            f"a scale of 8 bits instead of 16 costs at most 5 % more KL ({name})",
            f"{short['kl']:.4f} and {usual['kl']:.4f}",
            is_below(short["kl"], error, 1.05 * usual["kl"]),
        )


def _noise(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in where(rows, kind="noise"):
        verdict: Verdict = "holds" if row["kl"] < 1e-4 else "does not hold"
        yield Claim(
            QUESTION,
            "arithmetic in TensorFloat-32 would not blur a KL of 0.001",
            f"KL {row['kl']:.1e}, largest percentile {row['kl_p99']:.1e} ({row['device']})",
            verdict,
        )


LOSSLESS = {"smollm2-135m": 0.0018, "qwen2.5-coder-0.5b": 0.006}
"""The most KL of 4 bits with keys centred before their rotary embedding, in nats."""


def _centring(rows: Sequence[Row]) -> Iterator[Claim]:
    """Keys centred before and after their rotary embedding, and not at all, side by side."""
    found = {row["preset"]: row for row in where(rows, kind="centring", text="all")}
    for name, row in found.items():
        before, bare = found.get(f"{name} pre-RoPE"), found.get(f"{name} uncentred")
        if before is None:
            continue
        subject = f"{row['model']}, {name}, {row['tokens']:,} tokens in texts of {row['context']:,}"
        limit = LOSSLESS.get(row["model"])
        if limit is not None and name == "K4 V4 trellis w128":
            verdict = is_below(before["kl"], before["kl_se"], limit)
            yield Claim(
                "our aim",
                f"{subject}: a KL divergence of at most {limit} nats, centred before RoPE",
                describe(before),
                of_aim(verdict),
            )
        ways = {"before RoPE": before, "after": row} | ({"not centred": bare} if bare else {})
        yield Claim(
            QUESTION,
            f"{subject}: less KL with keys centred before their rotary embedding than after",
            "; ".join(f"{way}: {_loss(found)}" for way, found in ways.items()),
            is_less(before, row),
        )


def _loss(row: Row) -> str:
    change, error = row["perplexity_change"], row["perplexity_change_se"]
    return f"KL {row['kl']:.4f} ± {row['kl_se']:.4f}, perplexity {change:+.2%} ± {error:.2%}"


def _lengths(rows: Sequence[Row]) -> Iterator[Claim]:
    """Both means on the same tokens after more and more context; judged at the longest."""
    found = where(rows, kind="length", text="all")
    for name in distinct(found, "preset"):
        after, before = (
            sorted(where(found, preset=preset), key=lambda row: row["context"])
            for preset in (name, f"{name} pre-RoPE")
        )
        if not before or len(before) != len(after):
            continue
        longest = after[-1]
        lengths = ", ".join(f"{row['context']:,}" for row in after)
        yield Claim(
            QUESTION,
            f"{longest['model']}, {name}: at the end of {longest['context']:,} tokens less KL with "
            f"keys centred before their rotary embedding than after (last {longest['last']:,} of "
            f"{lengths} tokens)",
            f"before RoPE: {_kls(before)}; after: {_kls(after)}",
            is_less(before[-1], longest),
        )


def _kls(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['kl']:.4f} ± {row['kl_se']:.4f}" for row in rows)
