"""Everything static about a cache, in frozen dataclasses that hash and compare by value. No JAX."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Literal, get_args

import ml_dtypes  # noqa: F401  gives numpy bfloat16
import numpy as np

from turboquant_jax.cache.allocation import Allocation, Bits, Groups, is_split
from turboquant_jax.quantizers.formats import Code, Codebook, RotationKind, ScaleMode, SketchKind

CodecCode = Literal["scalar", "trellis", "prod"]
Scales = Literal["group", "joint", "joint_products"]
MOST_TRELLIS_BITS = 4
UNCODED = 16
"""Bits of keys, or of values, that blocks hold in full precision."""


@dataclass(frozen=True)
class CodecConfig:
    """How keys, or values, are quantized.

    Attributes:
      bits: bits per channel; or ((channels, bits), ...) to split the channels, outliers first:
        each group has its own rotation, codebook and scale. ((32, 3), (96, 2)) is what the paper
        calls 2.5 bits. Of "prod", one of each channel's bits is a sign of the sketch. 16: the
        vectors in the cache's 16-bit dtype, as they are; the other fields say nothing then.
      rotation: see `rotation.create`.
      codebook: see `quantizer.create`; "grid" is what the GPU kernels serve at full speed.
      code: "scalar", "trellis", or of keys "prod": a scalar code of one bit less, and the signs and
        the norm of what it leaves, for scores without bias (`quantizers.prod`).
      scale: the per-vector scale mode; "norm" is the paper's.
      scales: "group" for one of each group of channels; or one for all, of groups in a calibrated
        basis (`quantizers.channels`; `state.create` takes the calibration), largest channels first:
        "joint" with the least error of the vector, "joint_products" of its products.
      sketch: of "prod", see `qjl.create`; "gaussian" is the paper's.
    """

    bits: int | Groups = 4
    rotation: RotationKind = "hadamard"
    codebook: Codebook = "grid"
    code: CodecCode = "scalar"
    scale: ScaleMode = "least_squares"
    scales: Scales = "group"
    sketch: SketchKind = "orthogonal"

    def groups(self, head_dim: int) -> Groups:
        """((channels, bits), ...) that together cover the head.

        Raises:
          ValueError: bits that are neither an integer nor such groups.
        """
        groups = ((head_dim, self.bits),) if isinstance(self.bits, int) else self.bits
        if not is_split(groups):
            raise ValueError(
                f"bits: got {groups!r}, expected an integer or ((channels, bits), ...)"
            )
        return groups

    @property
    def coded(self) -> bool:
        """False for vectors in full precision."""
        return self.bits != UNCODED

    def of(self, bits: Bits) -> "CodecConfig":
        """The codec of a head of an allocation: without groups it has no use for a basis.

        Of more bits than a trellis has the code is a scalar one.
        """
        if not isinstance(bits, int):
            return replace(self, bits=bits)
        scalar = self.code == "trellis" and bits > MOST_TRELLIS_BITS
        return replace(self, bits=bits, scales="group", code="scalar" if scalar else self.code)

    def first_stage(self, head_dim: int) -> Groups:
        """`groups` without the bits that are signs of a sketch."""
        signs = int(self.code == "prod")
        return tuple((channels, bits - signs) for channels, bits in self.groups(head_dim))


def value_code(code: CodecCode) -> Code:
    """The code of values beside keys of this code: a sketch is for products, of keys alone."""
    return "scalar" if code == "prod" else code


@dataclass(frozen=True)
class Format:
    """How the keys and the values of a kv head are coded."""

    key: CodecConfig
    value: CodecConfig


@dataclass(frozen=True)
class CacheConfig:
    """The shape of a cache and the rule of what is compressed when.

    Of a sequence of length L, the first `sinks` tokens stay in full precision, then come

        C(L) = block * floor(max(0, L - sinks - window) / block)

    compressed tokens, and the rest, between `window` and `window + block - 1` of them, is the
    recent window in full precision. C depends on L alone, so that any order of appends gives the
    same cache.

    Attributes:
      num_layers, num_kv_heads, head_dim: the model's.
      key, value: the codecs.
      block: tokens of a block, a page of the pool: a multiple of 8.
      window: newest tokens that always stay in full precision.
      sinks: first tokens that always stay in full precision.
      center_keys: subtract the mean key of the first block (of each sequence and head) from the
        keys that are coded, and add its product with the query to their scores.
      rope_frequencies: radians per position of the model's rotary embedding, a number for each pair
        (c, c + R / 2) of its first R channels: the mean is that of the keys before it, and is
        turned to every place (`pre_rope`). None: the mean of the keys as they are stored.
      sliding_window: tokens that a query sees, itself included, in models with local attention;
        None = all of them. Blocks beyond it are given up and their pages used again.
      dtype: of everything in full precision.
      scale_bits: of a vector's scale: 16, a bfloat16, or 8 below a base for the tokens of a block
        (`short_scales`).
      allocation: bits of every layer, or of every head, in the place of the codecs' own; scales of
        several groups of channels are as the codecs have them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    key: CodecConfig = CodecConfig()
    value: CodecConfig = CodecConfig()
    block: int = 64
    window: int = 128
    sinks: int = 4
    center_keys: bool = True
    rope_frequencies: tuple[float, ...] | None = None
    sliding_window: int | None = None
    dtype: str = "bfloat16"
    allocation: Allocation | None = None
    scale_bits: int = 16

    def __post_init__(self):
        for name in ("num_layers", "num_kv_heads", "head_dim", "block"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("window", "sinks"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(self.block % 8 == 0, "block", "a multiple of 8 tokens", self.block)
        if self.sliding_window is not None:
            _require(self.sliding_window >= 1, "sliding_window", "at least 1", self.sliding_window)
        try:
            dtype = np.dtype(self.dtype)
        except TypeError as error:
            raise ValueError(f"dtype: got {self.dtype!r}, expected a floating type") from error
        _require("float" in dtype.name, "dtype", "a floating type", self.dtype)
        object.__setattr__(self, "dtype", dtype.name)  # compares, hashes and is saved as its name
        if self.rope_frequencies is not None:
            object.__setattr__(self, "rope_frequencies", self._checked_frequencies())
        if self.allocation is not None:
            self.allocation.check(self.num_layers, self.num_kv_heads, self.head_dim)
        self._check_uncoded()
        self._check_codecs()
        _require(self.scale_bits in (8, 16), "scale_bits", "8 or 16", self.scale_bits)
        _require(
            self.scale_bits == 16 or self.key.code != "prod",
            "scale_bits",
            "16, where the code is prod: its norms are of what such scales leave",
            self.scale_bits,
        )

    def _check_uncoded(self) -> None:
        names = [name for name in ("key", "value") if not getattr(self, name).coded]
        if not names:
            return
        _require(
            len(names) == 1,
            "key.bits and value.bits",
            "one of them coded: full precision of both is a window of the capacity",
            f"{UNCODED} and {UNCODED}",
        )
        what = f"{names[0]}.bits of {UNCODED}"
        size = np.dtype(self.dtype).itemsize
        _require(size == 2, f"dtype beside {what}", "one of 16 bits", self.dtype)
        codec = getattr(self, names[0])
        _require(codec.code != "prod", f"{names[0]}.code beside {what}", "no sketch", codec.code)
        _require(codec.scales == "group", f"scales beside {what}", "group", codec.scales)
        allocated = self.allocation is not None
        _require(not allocated, f"allocation beside {what}", "none", "bits of layers or heads")

    @property
    def centred(self) -> bool:
        """Whether keys are coded without their mean; of those in full precision none is taken."""
        return self.center_keys and self.key.coded

    def _check_codecs(self) -> None:
        for name, codes in (("key", get_args(CodecCode)), ("value", get_args(Code))):
            codec = getattr(self, name)
            expected = f"one of {', '.join(codes)}"
            if codec.code == "prod":
                expected += ": a sketch is for products of keys"
            _require(codec.code in codes, f"{name}.code", expected, repr(codec.code))
            _require(
                codec.code != "prod" or codec.scales == "group",
                f"{name}.scales",
                "group, where the code is prod",
                codec.scales,
            )
            _require(
                codec.scales in get_args(Scales),
                f"{name}.scales",
                f"one of {', '.join(get_args(Scales))}",
                repr(codec.scales),
            )
            _require(
                codec.scales == "group" or codec.scale == "least_squares",
                f"{name}.scale",
                "least_squares, where one scale is for all groups",
                codec.scale,
            )
            groups = codec.groups(self.head_dim)
            _require(
                sum(channels for channels, _ in groups) == self.head_dim,
                f"{name}.bits",
                f"groups of channels that add up to head_dim {self.head_dim}",
                groups,
            )
            for _, bits in groups if codec.coded else ():
                _require(1 <= bits <= 8, f"{name}.bits", f"between 1 and 8, or {UNCODED}", bits)
        for form in self.formats:
            for _, bits in form.key.first_stage(self.head_dim):
                _require(bits >= 1, "key.bits", "at least 2, one of them a sign of prod", bits + 1)

    def _checked_frequencies(self) -> tuple[float, ...]:
        frequencies = tuple(map(float, self.rope_frequencies or ()))
        _require(all(map(isfinite, frequencies)), "rope_frequencies", "finite ones", frequencies)
        _require(
            1 <= len(frequencies) <= self.head_dim / 2 and self.head_dim % 2 == 0,
            "rope_frequencies",
            f"1 for each pair of at most {self.head_dim} channels, an even number",
            f"{len(frequencies)}",
        )
        return frequencies

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """The different formats of the heads, in the order in which layers and heads meet them."""
        if self.allocation is None:
            return (Format(self.key, self.value),)
        return tuple(
            Format(self.key.of(key), self.value.of(value)) for key, value in self.allocation.kinds
        )

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Of every layer the number of its format, or those of its heads where they differ."""
        if self.allocation is None:
            return ((0,),) * self.num_layers
        kinds = self.allocation.kinds
        return tuple(tuple(map(kinds.index, layer)) for layer in self.allocation.layers)

    def compressed_tokens(self, length):
        """C(length): works on ints and on arrays."""
        blocks = (length - self.sinks - self.window) // self.block
        return self.block * ((blocks + abs(blocks)) // 2)  # max(0, blocks), of ints and of arrays

    def num_blocks(self, length):
        """Blocks compressed at this length."""
        return self.compressed_tokens(length) // self.block


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: got {got}, expected {expected}")
