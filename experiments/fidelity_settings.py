"""The settings that `fidelity` measures: candidates for presets, and curves over one property."""

from collections.abc import Sequence

from experiments.experiment import Row, where
from experiments.settings import Setting, turbo, unique
from turboquant_jax.quantizer import Code

TARGETS = (3.5, 4.8, 5.7, 7.0)
"""Ratios to full precision, true bytes, that have a target of quality."""

STANDARD = ("K4 V4 w64", "K4 V4 w128", "K3 V3 w128", "K2 V2 w128", "K3 V2 trellis w64")
"""Judged on the test texts whatever the calibration says: for comparison with other tables."""


def candidates() -> list[Setting]:
    """What a preset could be, most wanted first."""
    first: list[tuple[int, int, Code]] = [
        (3, 2, "trellis"),
        (2, 2, "trellis"),
        (3, 3, "trellis"),
        (4, 4, "scalar"),
    ]
    second: list[tuple[int, int, Code]] = [
        (3, 3, "scalar"),
        (2, 2, "scalar"),
        (4, 3, "trellis"),
        (3, 1, "trellis"),
    ]
    third: list[tuple[int, int, Code]] = [
        (3, 2, "scalar"),
        (4, 2, "trellis"),
        (4, 4, "trellis"),
        (4, 3, "scalar"),
    ]
    made = [turbo(*bits, window=window) for bits in first for window in (64, 128, 256)]
    # a scale of 8 bits and small blocks, whose window has less slack: for 8,192 tokens
    for key_bits, value_bits, windows in (
        (3, 2, (64, 128, 256, 352)),
        (2, 2, (64, 128, 256, 320)),
        (3, 3, (64, 96)),
        (4, 2, (64,)),
        (4, 4, (64,)),
    ):
        bits = key_bits, value_bits
        made += [turbo(*bits, "trellis", True, window=window, block=16) for window in windows]
    made += [turbo(*bits, window=window) for bits in second for window in (64, 128)]
    made += [turbo(3, 2, "trellis", True), turbo(2, 2, "trellis", True)]
    made += [turbo(2, 2, "trellis", window=window, block=16) for window in (128, 256)]
    made += [turbo(3, 2, "trellis", window=256, block=16), turbo(4, 4, window=32)]
    made += [turbo(*bits, window=64) for bits in third]
    made += [
        turbo(5, 4),
        turbo(2, 1, "trellis", window=256, block=16),
        turbo(2, 3, "trellis", window=128),
    ]
    return unique(made)


def front(rows: Sequence[Row], per_target: int = 3) -> set[str]:
    """Presets worth testing: nothing at most as large has less KL, and the best of each target.

    Bytes are those at the context and those at 65,536 tokens; KL that of the calibration texts.
    """
    found = [row for row in where(rows, text="all") if row["kind"] == "candidate"]
    names = {row["preset"] for row in found if row["preset"] in STANDARD}
    for ratio in ("ratio", "ratio_64k"):
        names |= {
            row["preset"]
            for row in found
            if not any(other[ratio] >= row[ratio] and other["kl"] < row["kl"] for other in found)
        }
        for target in TARGETS:
            names |= {row["preset"] for row in best(found, ratio, target)[:per_target]}
    return names


def best(rows: Sequence[Row], ratio: str, target: float) -> list[Row]:
    """Rows of at least this ratio, the least KL first."""
    return sorted((row for row in rows if row[ratio] >= target), key=lambda row: row["kl"])


def few() -> list[Setting]:
    """A few settings for other lengths of text."""
    return [
        turbo(4, 4, window=64),
        turbo(3, 3, window=64),
        turbo(3, 2, "trellis", window=64),
        turbo(2, 2, "trellis", window=64),
        turbo(4, 4, window=0, sinks=0, centred=False),
    ]


def curves() -> list[Setting]:
    """One property at a time around K3 V3, K4 V4 and K2 V2 with a window of 64."""
    made = [turbo(bits, bits) for bits in range(1, 9)]
    made += [turbo(bits, bits, "trellis") for bits in range(1, 5)]
    # nothing of TurboQuant's remedies: the paper's cache, and one remedy at a time
    for bits in (4, 3):
        made += [
            turbo(bits, bits, window=0, sinks=0, centred=False),
            turbo(bits, bits, window=0, sinks=4, centred=False),
            turbo(bits, bits, window=0, sinks=4, centred=True),
            turbo(bits, bits, window=64, sinks=0, centred=False),
            turbo(bits, bits, window=64, sinks=4, centred=False),
        ]
    made += [turbo(2, 2, centred=False)]
    # keys and values alone
    made += [turbo(bits, None) for bits in (1, 2, 3, 4, 5, 6)]
    made += [turbo(None, bits) for bits in (1, 2, 3, 4, 5, 6)]
    # window, sinks, block
    for window in (0, 16, 32, 128, 256, 512):
        made += [turbo(3, 3, window=window), turbo(2, 2, "trellis", window=window)]
    made += [turbo(3, 3, sinks=sinks) for sinks in (0, 1, 16, 64)]
    made += [turbo(3, 3, block=block) for block in (16, 32, 128)]
    # scales, rotations, levels
    for bits in (2, 3, 4):
        made += [turbo(bits, bits, scale=mode) for mode in ("norm", "matched", "unbiased")]
        made += [turbo(bits, bits, rotation=kind) for kind in ("haar", "identity")]
    made += [turbo(3, 3, codebook=levels) for levels in ("lloyd_max", "uniform")]
    made += [turbo(bits, bits, "trellis", True) for bits in (2, 3)]
    # the grid of bits
    made += [turbo(k, v) for k in (2, 3, 4, 5) for v in (2, 3, 4, 5)]
    made += [turbo(k, v, "trellis") for k in (1, 2, 3, 4) for v in (1, 2, 3, 4)]
    made += [turbo(((32, 4), (32, 3)), 3), turbo(((32, 3), (32, 2)), 2)]
    return unique(made)
