"""How keys and values can be coded, ours and the peers': round trips over arrays, and their bytes.

A coder is static; `trip` draws what is random and returns the function that `forcing` applies to
the keys (centred where the setting says so) or values of a layer. The peers, as papers or code
have them:

- `Kivi`: keys a channel at a time over groups of 32 tokens, values a token at a time over groups of
  32 channels, asymmetric min-max levels, zero and step in 16 bits (arXiv:2402.02750).
- `PerToken`: the values' half of it for both, over groups of 32 channels or the whole head.
- `VllmKey`: an unsigned Hadamard, Gaussian Lloyd-Max levels and a corrected norm, in 16 bits (the
  keys of vLLM's turboquant presets; its values are `PerToken` over the whole head).
- `Fp8`: e4m3 with a scale of one.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from experiments.fidelity.forcing import ROUNDING, Trip
from turboquant_jax.cache import CodecConfig, short_scales
from turboquant_jax.cache import codec as codecs
from turboquant_jax.quantizers import quantizer as quantizers
from turboquant_jax.quantizers.rotation import Hadamard

_GROUP = 32  # channels, or tokens, that share a zero and a step in KIVI
_PIECE = 8192  # tokens that are coded at a time
_compiled = partial(jax.jit, compiler_options=ROUNDING)


@dataclass(frozen=True)
class Turbo:
    """The library's codec. `short_scale` stores a scale in 8 bits, 5 of exponent, 3 of mantissa."""

    config: CodecConfig
    short_scale: bool = False

    @property
    def bits(self) -> float:
        """Bits of codes a channel."""
        if isinstance(self.config.bits, int):
            return self.config.bits
        channels = sum(count for count, _ in self.config.bits)
        return sum(count * bits for count, bits in self.config.bits) / channels

    @property
    def name(self) -> str:
        """The code, for a table."""
        sketch = f", {self.config.sketch} sketch" if self.config.code == "prod" else ""
        return self.config.code + sketch + (", scale in 8 bits" if self.short_scale else "")

    def vector_bytes(self, dim: int) -> float:
        """Bytes of a vector: codes and scales; signs of a sketch are among its bits."""
        groups = self.config.groups(dim)
        scales = len(groups) + (self.config.code == "prod")
        return sum(count * bits / 8 for count, bits in groups) + scales * (
            1 if self.short_scale else 2
        )

    def trip(self, key: Array, dim: int) -> Trip:
        """Through the library's codec with a rotation of this key."""
        return partial(through, codecs.create(key, self.config, dim), short=self.short_scale)


@dataclass(frozen=True)
class Kivi:
    """KIVI's keys or values."""

    bits: int
    keys: bool
    name: str = "uniform, KIVI's groups"

    def vector_bytes(self, dim: int) -> float:
        """Bytes of a vector: codes, and its share of the groups' zeros and steps."""
        return dim * self.bits / 8 + 4 * dim / _GROUP

    def trip(self, key: Array, dim: int) -> Trip:
        """Groups of tokens are counted from the start of the text: needs blocks of 32, no sinks."""
        return partial(_per_channel if self.keys else _per_token, bits=self.bits, group=_GROUP)


@dataclass(frozen=True)
class PerToken:
    """Min-max levels over groups of channels of one token."""

    bits: int
    group: int = _GROUP
    name: str = "uniform per token"

    def vector_bytes(self, dim: int) -> float:
        """Bytes of a vector: codes, zeros and steps."""
        return dim * self.bits / 8 + 4 * dim / self.group

    def trip(self, key: Array, dim: int) -> Trip:
        """Not random."""
        return partial(_per_token, bits=self.bits, group=self.group)


@dataclass(frozen=True)
class VllmKey:
    """Keys of vLLM's turboquant_4bit_nc and 3bit_nc."""

    bits: int
    name: str = "vLLM nc"

    def vector_bytes(self, dim: int) -> float:
        """Bytes of a vector: codes and a norm."""
        return dim * self.bits / 8 + 2

    def trip(self, key: Array, dim: int) -> Trip:
        """Not random."""
        options: dict[str, Any] = dict(
            rotation="identity", codebook="gaussian", scale="matched", scale_dtype=jnp.float16
        )
        made = quantizers.create(key, dim, self.bits, **options)
        made = replace(made, rotation=Hadamard(jnp.ones(dim), dim))
        return partial(through, codecs.Codec((made,), None))


@dataclass(frozen=True)
class Fp8:
    """Eight bits of floating point."""

    bits: int = 8
    name: str = "fp8 e4m3"

    def vector_bytes(self, dim: int) -> float:
        """One a channel."""
        return dim

    def trip(self, key: Array, dim: int) -> Trip:
        """Not random."""
        return _fp8


@dataclass(frozen=True)
class Exact:
    """Full precision, 16 bits."""

    bits: int = 16
    name: str = "full precision"

    def vector_bytes(self, dim: int) -> float:
        """Two a channel."""
        return 2 * dim

    def trip(self, key: Array, dim: int) -> None:
        """Nothing happens."""
        return None


@dataclass(frozen=True)
class Mean:
    """What vectors take on average that every layer codes in its own way; codes nothing itself.

    `beside` are the bytes of a vector beside its codes: its scale, in 8 bits.
    """

    bits: float
    name: str = "trellis, scale in 8 bits, bits of every layer's own"
    beside: float = 1

    def vector_bytes(self, dim: int) -> float:
        """Bytes of a vector: codes, and what is beside them."""
        return dim * self.bits / 8 + self.beside

    def trip(self, key: Array, dim: int) -> Trip:
        """Only for accounting."""
        raise NotImplementedError


Coder = Turbo | Kivi | PerToken | VllmKey | Fp8 | Exact | Mean


def through(
    codec: codecs.Codec,
    x: Float[Array, "B T K H"],
    short: bool | tuple[int, int] = False,
    first: int = 0,
) -> Float[Array, "B T K H"]:
    """Through a codec of the library and back; the heads are its rows from the `first` on.

    `short` scales have 3 bits of mantissa; or, with (sinks, block), are the cache's own of 8 bits.
    Codes and vectors are found in pieces of one size, so that texts of any length are served by the
    same compiled functions: on a GPU those of a trellis take seconds each.
    """
    count = x.shape[0] * x.shape[1]
    piece = min(count, _PIECE)
    flat = jnp.pad(x.reshape(count, *x.shape[2:]), ((0, -count % piece), (0, 0), (0, 0)), "edge")
    coded = [_encode(codec, part, first) for part in jnp.split(flat, len(flat) // piece)]
    scales = [jnp.concatenate(parts)[:count] for parts in zip(*(s for _, s in coded), strict=True)]
    if short:
        scales = [_short(s.reshape(*x.shape[:2], -1), short).reshape(s.shape) for s in scales]
    scales = [jnp.pad(s, ((0, -count % piece), (0, 0)), "edge") for s in scales]
    pieces = zip(*(jnp.split(s, len(coded)) for s in scales), strict=True)
    back = [_decode(codec, codes, s, first) for (codes, _), s in zip(coded, pieces, strict=True)]
    return jnp.concatenate(back)[:count].reshape(x.shape)


@_compiled
def _encode(codec: codecs.Codec, x: Float[Array, "n K H"], first: int):
    """Indices of every group, and the scales of those that have their own."""
    groups = codec.quantize(first + jnp.arange(x.shape[1], dtype=jnp.int32), x)
    return tuple(codes for codes, _ in groups), tuple(s for _, s in groups if s is not None)


@_compiled
def _decode(codec: codecs.Codec, codes, scales, first: int) -> Float[Array, "n K H"]:
    """What these indices and scales stand for."""
    first_groups, rest = codes[: len(scales)], codes[len(scales) :]
    groups = (*zip(first_groups, scales, strict=True), *((own, None) for own in rest))
    rows = first + jnp.arange(scales[0].shape[1], dtype=jnp.int32)
    return codec.unrotate(rows, codec.dequantize(groups))


@partial(_compiled, static_argnums=1)
def _short(scale: Array, rule: bool | tuple[int, int]) -> Array:
    if isinstance(rule, tuple):
        return short_scales.through(scale, *rule)
    return lax.reduce_precision(scale.astype(jnp.float32), 5, 3)


@partial(_compiled, static_argnames=("bits", "group"))
def _per_token(x: Float[Array, "B T K H"], bits: int, group: int) -> Float[Array, "B T K H"]:
    return min_max(x.reshape(*x.shape[:-1], -1, group), bits).reshape(x.shape)


@partial(_compiled, static_argnames=("bits", "group"))
def _per_channel(x: Float[Array, "B T K H"], bits: int, group: int) -> Float[Array, "B T K H"]:
    batch, count, heads, dim = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -count % group), (0, 0), (0, 0)), mode="edge")
    groups = jnp.moveaxis(padded.reshape(batch, -1, group, heads, dim), 2, -1)
    back = jnp.moveaxis(min_max(groups, bits), -1, 2).reshape(batch, -1, heads, dim)
    return back[:, :count]


@_compiled
def _fp8(x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    return jnp.clip(x, -largest, largest).astype(jnp.float8_e4m3fn).astype(jnp.float32)


def min_max(groups: Float[Array, "*n group"], bits: int) -> Float[Array, "*n group"]:
    """Round to 2**bits levels from the least to the greatest of a group, both stored in 16 bits."""
    low, high = (f(groups, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    low = low.astype(jnp.float16).astype(jnp.float32)
    step = ((high - low) / (2**bits - 1)).astype(jnp.float16).astype(jnp.float32)
    usable = jnp.where(step > 0, step, 1.0)
    return low + step * jnp.clip(jnp.round((groups - low) / usable), 0, 2**bits - 1)
