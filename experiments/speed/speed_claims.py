"""What the rows of the speed measurements say about our aims."""

from collections.abc import Iterator, Sequence

from experiments.harness.experiment import Claim, Row, where
from experiments.harness.statistics import met

SHAPES = ((32, 4096), (8, 32768), (1, 131072), (1, 8192))
# At least so many times cuDNN's bfloat16, in the order of SHAPES.
TARGETS = {4: (2.9, 3.2, 2.9, 1.0), 3: (3.5, 3.8, 3.5, 1.0), 2: (4.5, 5.0, 4.5, 1.0)}
AIMS = (3.4, 3.6, 3.4)
WITH_MEAN = (2.95, 3.15, 2.95)
CALIBRATED = (4.0, 4.4)
UNLIKE = 1.10
PAGED, STEP, COPY, APART = 1.05, 1.10, 0.75, 1e-5
WHOLE, CHUNKED, PEAK, TURNED = 1.05, 1.15, 1.10, 1.10
OURS = "our aim"


def decode(rows: Sequence[Row]) -> list[Claim]:
    """Of `decode_speed`."""
    return [*_times(rows), *_paged(rows), *_unlike(rows)]


def _times(rows: Sequence[Row]) -> Iterator[Claim]:
    wanted = [(f"{bits} bits, at least", bits, targets) for bits, targets in TARGETS.items()]
    plain = where(_plain(rows), implementation="pallas")
    for what, bits, targets in [*wanted, ("4 bits, hoped for", 4, AIMS)]:
        yield from _by_shape(what, where(plain, bits_k=bits, bits_v=bits), targets)
    trellis = where(_plain(rows), implementation="pallas-trellis")
    for bits, targets in TARGETS.items():
        what = f"{bits} bits in a trellis, at least"
        yield from _by_shape(what, where(trellis, bits_k=bits, bits_v=bits), targets)
    mean = where(rows, implementation="pallas-exact", mean="pre_rope", queries=4)
    what = "4 bits, the mean before RoPE added back, at least"
    yield from _by_shape(what, where(mean, bits_k=4, bits_v=4), WITH_MEAN)
    for name, count, codes in (
        ("pallas-7x", "four", "trellis"),
        ("pallas-7x-scalar", "four", "scalar"),
        ("pallas-7x-two", "two", "trellis"),
        ("pallas-7x-scalar-two", "two", "scalar"),
    ):
        what = (
            f"heads of {count} calibrated formats, 7 times smaller, {codes} codes, with that mean, "
            "at least"
        )
        yield from _by_shape(what, where(rows, implementation=name), CALIBRATED)


def _by_shape(what: str, rows: Sequence[Row], targets: Sequence[float]) -> Iterator[Claim]:
    found = {(row["batch"], row["tokens"]): row["speedup_over_cudnn"] for row in rows}
    pairs = [(s, t, found[s]) for s, t in zip(SHAPES, targets, strict=False) if s in found]
    if pairs:
        yield Claim(
            OURS,
            f"{what} {_list(t for _, t, _ in pairs)} times cuDNN's bfloat16 at "
            + ", ".join(f"{batch} x {tokens:,}" for (batch, tokens), _, _ in pairs),
            _list((x for *_, x in pairs), ".2f") + " times",
            met(all(x >= t for _, t, x in pairs)),
        )


def _paged(rows: Sequence[Row]) -> Iterator[Claim]:
    same, ratios = ("bits_k", "bits_v", "batch", "tokens"), []
    for dense in where(rows, implementation="pallas-dense"):
        for row in where(rows, implementation="pallas", **{name: dense[name] for name in same})[:1]:
            ratios.append(row["milliseconds"] / dense["milliseconds"])
    if ratios:
        yield Claim(
            OURS,
            f"4 bits: pages in random order take at most {PAGED} times pages in order",
            _list(ratios, ".3f") + " times",
            met(max(ratios) <= PAGED),
        )


def _unlike(rows: Sequence[Row]) -> Iterator[Claim]:
    """Batches of unlike lengths beside those of equal ones."""
    for equal in where(rows, lengths="equal"):
        same = {name: equal[name] for name in ("bits_k", "bits_v", "batch", "tokens")}
        found = [
            row for row in where(rows, **same) if row.get("lengths") not in ("", "equal", None)
        ]
        ratios = [row["milliseconds"] / equal["milliseconds"] for row in found]
        if ratios:
            yield Claim(
                OURS,
                f"{equal['bits_k']:g} bits, {equal['batch']} x {equal['tokens']:,}: unlike lengths "
                f"take at most {UNLIKE:.2f} times as long as equal ones of as many tokens",
                ", ".join(
                    f"{x:.2f} ({row['lengths']})" for x, row in zip(ratios, found, strict=True)
                ),
                met(max(ratios) <= UNLIKE),
            )


def step(rows: Sequence[Row]) -> list[Claim]:
    """Of `step_speed`."""
    whole = where(rows, part="step", batch=8, tokens=32768)
    return [
        *(
            Claim(
                OURS,
                f"8 x 32,768, {row['bits']} bits: a step takes at most {STEP:.2f} times the kernel",
                f"{row['ratio_to_blocks']:.3f} times: {row['milliseconds'] * 1e3:.1f} us a layer",
                met(row["ratio_to_blocks"] <= STEP),
            )
            for row in _plain(whole)
        ),
        *_turned(whole, "a step of 8 sequences"),
    ]


def encode(rows: Sequence[Row]) -> list[Claim]:
    """Of `encode_speed`."""
    return [*_copied(_plain(rows)), *_codes(rows), *_turned(rows, "compression")]


def _copied(rows: Sequence[Row]) -> Iterator[Claim]:
    default = dict(rotation="hadamard", scale="least_squares", centred="True")
    found = where(rows, implementation="pallas", bits=4, **default)
    shares = [(row["fraction_of_copy_bandwidth"], row["tokens"]) for row in found]
    if shares:
        yield Claim(
            OURS,
            f"4 bits: bytes are read and written at {COPY} or more of the copy bandwidth",
            ", ".join(f"{share:.2f} at {tokens:,} tokens" for share, tokens in shares),
            met(min(shares)[0] >= COPY),
        )


def _codes(rows: Sequence[Row]) -> Iterator[Claim]:
    apart = [r["codes_apart"] for r in where(rows, implementation="pallas")]
    apart = [x for x in apart if x == x]
    if apart:
        yield Claim(
            OURS,
            f"fewer than {APART:g} of all codes differ from the definition's",
            f"at most {max(apart):.1e}",
            met(max(apart) < APART),
        )


def _turned(rows: Sequence[Row], what: str) -> Iterator[Claim]:
    """A mean before RoPE beside that of the stored keys, of the same run."""
    pairs = [
        (before["milliseconds"] / stored["milliseconds"], stored["tokens"])
        for stored in where(rows, mean="stored")
        for before in where(rows, mean="pre_rope", tokens=stored["tokens"], bits=stored["bits"])
    ]
    if pairs:
        yield Claim(
            OURS,
            f"{what} with the mean before RoPE: at most {TURNED:.2f} times as long as stored",
            ", ".join(f"{ratio:.2f} at {tokens:,} tokens" for ratio, tokens in pairs),
            met(max(pairs)[0] <= TURNED),
        )


def prefill(rows: Sequence[Row]) -> list[Claim]:
    """Of `prefill_speed`."""
    claims = list(_turned(rows, "a prompt in one chunk"))
    rows = _plain(rows)
    for name, tokens, limit in (("whole", 32768, WHOLE), ("chunked", 131072, CHUNKED)):
        found = where(rows, setting=f"{name}: compressed", tokens=tokens)
        if found:
            what = "in one chunk, then compressed" if name == "whole" else "in chunks of 8,192"
            claims.append(
                Claim(
                    OURS,
                    f"{tokens:,} tokens {what}: at most {limit} times cuDNN on bfloat16",
                    ", ".join(f"{r['bits']} bits {r['ratio_to_cudnn']:.3f}" for r in found),
                    met(max(r["ratio_to_cudnn"] for r in found) <= limit),
                )
            )
    found = where(rows, setting="chunked: compressed")
    if found:
        claims.append(
            Claim(
                OURS,
                f"in chunks, at most {PEAK:.2f} times the memory of cache, prompt and one chunk",
                ", ".join(f"{r['bits']} bits {r['peak_ratio']:.3f}" for r in found),
                met(max(r["peak_ratio"] for r in found) <= PEAK),
            )
        )
    return claims


def _plain(rows: Sequence[Row]) -> list[Row]:
    """Without those that compare means, or lengths."""
    return [row for row in rows if not row.get("mean") and not row.get("lengths")]


def _list(numbers, form: str = "g") -> str:
    return ", ".join(format(x, form) for x in numbers)
