"""The settings that `fidelity` measures: candidates for presets, and curves over one property."""

from collections.abc import Sequence
from dataclasses import replace

from experiments.fidelity.settings import Setting, turbo, unique
from experiments.harness.experiment import Row
from turboquant_jax.quantizers.quantizer import Code

TARGETS = (3.5, 4.8, 5.7, 7.0)
"""Ratios to full precision, true bytes, that have a target of quality."""


def candidates() -> list[Setting]:
    """What a preset could be, and what else could be had for its bytes."""
    bits: list[tuple[int, int, Code]] = [
        (3, 2, "trellis"),
        (2, 2, "trellis"),
        (3, 3, "trellis"),
        (4, 4, "scalar"),
    ]
    made = [turbo(*each, window=window) for each in bits for window in (64, 128, 256)]
    # a scale of 8 bits and small blocks, whose window has less slack: for 8,192 tokens
    for key_bits, value_bits, windows in (
        (4, 4, (256,)),
        (3, 3, (96,)),
        (3, 2, (64, 128, 256, 352)),
        (2, 2, (64, 128)),
    ):
        both = key_bits, value_bits
        made += [turbo(*both, "trellis", True, window=window, block=16) for window in windows]
    made += [turbo(4, 4, "trellis", window=128), turbo(3, 3, window=128)]
    made += [pre_rope(s) for s in made if s.window == 128 or s.block == 16]
    balance = turbo(2, 3, "trellis", window=128)
    shorter = turbo(2, 3, "trellis", True, window=64, block=16)
    return [*made, balance, shorter, pre_rope(balance), pre_rope(shorter)]


def pre_rope(setting: Setting) -> Setting:
    """The same with keys centred before their rotary embedding."""
    return replace(setting, pre_rope=True, preset=f"{setting.preset} pre-RoPE")


def judged() -> list[Setting]:
    """What the test texts judge: what the candidates' rows choose, and what it is compared with."""
    bits = (4, 4), (3, 3), (3, 2), (2, 2)
    presets = [turbo(4, 4, window=128)]
    presets += [turbo(k, v, "trellis", window=128) for k, v in bits[1:]]
    made = [*presets, *map(pre_rope, presets)]
    made += [turbo(4, 4, window=0, sinks=0, centred=False), turbo(4, 4, "trellis", window=128)]
    # the best of its bytes at 8,192 tokens
    for k, v in ((3, 2), (2, 2)):
        short = turbo(k, v, "trellis", True, window=64, block=16)
        made += [short, pre_rope(short)]
    made += [
        turbo(3, 2, "trellis", True, window=352, block=16),
        pre_rope(turbo(3, 3, "trellis", True, window=96, block=16)),
        pre_rope(turbo(2, 2, "trellis", True, window=128, block=16)),
        pre_rope(turbo(4, 4, "trellis", True, window=256, block=16)),
        turbo(3, 2, "trellis", window=256),
        turbo(3, 3, "trellis", window=256),
    ]
    return unique(made)


def best(rows: Sequence[Row], ratio: str, target: float, ours: bool = False) -> Row | None:
    """The row of the least KL among those of at least this ratio; `ours`: of the library's caches.

    The library has scales of 16 bits.
    """
    found = [row for row in rows if row[ratio] >= target]
    if ours:
        found = [row for row in found if "scale8" not in row["preset"]]
    return min(found, key=lambda row: row["kl"], default=None)


def chosen(rows: Sequence[Row]) -> list[str]:
    """Names of the candidates that a target chooses, from their rows."""
    found = [
        best(rows, ratio, target, ours)
        for ratio in ("ratio", "ratio_64k")
        for target in TARGETS
        for ours in (True, False)
    ]
    return list(dict.fromkeys(row["preset"] for row in found if row is not None))


def centring() -> list[Setting]:
    """Keys centred after and before their rotary embedding, and at 4 bits not at all."""
    made = []
    for bits in ((4, 4), (3, 3), (3, 2), (2, 2)):
        made += both_means(turbo(*bits, "trellis", window=128))
    made += both_means(turbo(4, 4, window=128))
    codes: tuple[Code, ...] = ("trellis", "scalar")
    return [*made, *(turbo(4, 4, code, window=128, centred=False) for code in codes)]


def over_length() -> list[Setting]:
    """The presets of the most and the fewest bits, with both means."""
    made = (turbo(bits, bits, "trellis", window=128) for bits in (4, 2))
    return [one for setting in made for one in both_means(setting)]


def both_means(setting: Setting) -> list[Setting]:
    """Keys centred after and before their rotary embedding."""
    return [setting, pre_rope(setting)]


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
    # keys centred before their rotary embedding
    made += [turbo(bits, None, pre_rope=True) for bits in (2, 3)]
    made += [pre_rope(turbo(3, 3)), pre_rope(turbo(2, 2, "trellis"))]
    made += [turbo(4, 4, window=0, pre_rope=on) for on in (False, True)]
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


def describe(row: Row) -> str:
    """A row in words."""
    return (
        f"{row['preset']} ({row['ratio']:.2f}x here, {row['ratio_64k']:.2f}x at 64K): perplexity "
        f"{row['perplexity_change']:+.2%} ± {row['perplexity_change_se']:.2%}, "
        f"KL {row['kl']:.4f} ± {row['kl_se']:.4f}"
    )
