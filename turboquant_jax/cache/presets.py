"""Caches by what they cost and what they lose, as measured on a small model.

SmolLM2-135M-Instruct (head dim 64) read encyclopedia, Bible and code in texts of 8,192 tokens,
every query seeing what it would see when decoding; three rotations. Bytes a token count the whole
cache of one sequence (codes, scales, window, sinks, mean key, page tables), 23,040 in full
precision.

    name       keys, values        bytes a token, ratio         perplexity        KL, nats
                                  at 8,192        at 65,536                        a token
    lossless   4, 4, trellis    6,531  3.53x    6,172  3.73x   +0.17 % ± 0.05 %    0.0022
    balanced   3, 3, trellis    5,125  4.50x    4,736  4.87x   +0.77 % ± 0.10 %    0.0099
    compact    3, 2, trellis    4,421  5.21x    4,018  5.73x   +1.56 % ± 0.15 %    0.0189
    max        2, 2, trellis    3,718  6.20x    3,300  6.98x   +4.33 % ± 0.32 %    0.0495

± is one standard error, over chunks of 1,024 tokens and rotations. Other texts chose the presets.
Perplexity flatters: of the needles in 1,024 to 8,192 tokens of essays that full precision finds,
`balanced` keeps 84 % and `max` 45 % (`REPORT.md`). Larger models and head dims have not been
measured. At head dim 128 scales weigh half as much: 3.88, 5.12, 6.10 and 7.53 times are the limits
at length. Measured with the trellis' trained levels; the presets have them rounded to the grid of
the GPU kernels, for less than 0.03 % more error of the codes.

Beside a calibration of the model (`fitting.fit_preset`, docs/calibration.md) a preset stands for
its bytes at 65,536 tokens, which heads share as they lose least; "max" is 7.0 times smaller then,
with a window of 256, and "lossless" 3.8 times, as the matrices of the heads count too. Judged like
the table, SmolLM2's committed calibration (scales of 8 bits, mean before RoPE) loses

    lossless 0.0005    balanced 0.0016    compact 0.0031    max 0.0054

nats a token; the presets without them, with the same mean, 0.0013, 0.0062, 0.0157 and 0.0376. A
window of 256 in `max` keeps its bytes at 65,536 tokens and takes a quarter off the loss on the
texts that choose; at 8,192 tokens it makes the cache 6 % larger.
"""

from typing import Literal

from turboquant_jax.cache.config import CacheConfig, CodecConfig

Preset = Literal["lossless", "balanced", "compact", "max"]

WINDOW = 128
"""Newest tokens in full precision, of every preset."""
CALIBRATED_WINDOWS: dict[str, int] = {"max": 256}
"""Of the presets that have more of them beside a calibration, in the same bytes at length."""

_CODECS = {
    "lossless": (CodecConfig(4, code="trellis"), CodecConfig(4, code="trellis")),
    "balanced": (CodecConfig(3, code="trellis"), CodecConfig(3, code="trellis")),
    "compact": (CodecConfig(3, code="trellis"), CodecConfig(2, code="trellis")),
    "max": (CodecConfig(2, code="trellis"), CodecConfig(2, code="trellis")),
}


def codecs(name: Preset) -> tuple[CodecConfig, CodecConfig]:
    """The codecs of keys and of values of a preset.

    Raises:
      ValueError: another name.
    """
    if name not in _CODECS:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(_CODECS)}")
    return _CODECS[name]


def window(name: Preset, calibrated: bool = False) -> int:
    """Newest tokens in full precision, of a preset alone or beside a calibration of the model."""
    return CALIBRATED_WINDOWS.get(name, WINDOW) if calibrated else WINDOW


def preset(
    name: Preset,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    rope_frequencies: tuple[float, ...] | None = None,
) -> CacheConfig:
    """A named cache for a model: sinks of 4, a window of 128, blocks of 64, centred keys.

    Beside a calibration the window is that of `window`.

    Args:
      name: "lossless", "balanced", "compact" or "max", as the table above has them.
      num_layers: the model's.
      num_kv_heads: the model's.
      head_dim: the model's.
      rope_frequencies: the model's, see `CacheConfig`; without them keys are centred as stored.

    Returns:
      A configuration; `dataclasses.replace` changes the rest of it.

    Raises:
      ValueError: another name.
    """
    key, value = codecs(name)
    return CacheConfig(
        num_layers,
        num_kv_heads,
        head_dim,
        key,
        value,
        block=64,
        window=WINDOW,
        sinks=4,
        center_keys=True,
        rope_frequencies=rope_frequencies,
    )
