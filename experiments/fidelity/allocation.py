"""Caches whose parts are held differently: one part alone, and bits of every layer's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.fidelity.calibrated import by_head
from experiments.fidelity.codecs import Turbo
from experiments.fidelity.forcing import Trip, Trips
from experiments.fidelity.rule import Rule
from experiments.fidelity.settings import Setting, turbo
from experiments.harness import results
from experiments.harness.experiment import Row, where
from turboquant_jax.cache import CodecConfig
from turboquant_jax.models import LlamaConfig


@dataclass(frozen=True)
class One:
    """Only the keys ("K") or the values ("V") of a layer, or of one head of it, are compressed."""

    bits: int
    layer: int
    part: str
    head: int | None = None

    rule: Rule = field(default=Rule(64, 4, 64, True), repr=False)
    is_random: bool = field(default=True, repr=False)

    @property
    def first_layer(self) -> int:
        """The layer."""
        return self.layer

    def columns(self) -> Row:
        """For a row."""
        where: Row = {"part": self.part, "layer": self.layer, "bits": self.bits}
        return where if self.head is None else {**where, "head": self.head}

    def trips(self, seed: int, model: LlamaConfig) -> Trips:
        """Nothing but the one part."""
        trip = _trips(seed, model)["KV".index(self.part)][self.bits]
        if self.head is not None:
            trip = partial(_only, trip, jnp.arange(model.num_kv_heads) == self.head)
        alone = (trip, None) if self.part == "K" else (None, trip)
        return lambda layer: alone if layer == self.layer else (None, None)


@dataclass(frozen=True)
class Mixed:
    """Bits of the keys of every layer, or of each of its heads, then those of the values.

    `short_scale` as of `Turbo`.
    """

    bits: tuple[int, ...]
    rule: Rule
    short_scale: bool = False

    is_random: bool = field(default=True, repr=False)
    first_layer: int = field(default=0, repr=False)

    def describe(self) -> str:
        """Digits of the keys, digits of the values."""
        digits, parts = "".join(map(str, self.bits)), len(self.bits) // 2
        return f"K {digits[:parts]} V {digits[parts:]}"

    def trips(self, seed: int, model: LlamaConfig) -> Trips:
        """The same rotation for every layer."""
        both = _trips(seed, model, self.short_scale)
        bits = np.reshape(self.bits, (2, model.num_layers, -1))

        def at(layer: int) -> tuple[Trip, Trip]:
            key, value = (by_head(trips, bits[i, layer].tolist()) for i, trips in enumerate(both))
            return key, value

        return at


@dataclass(frozen=True)
class Allocated:
    """A mixed cache of `layer_ablation`'s committed results beside the settings; `setting` has its
    bytes."""

    preset: str
    setting: Setting
    mixed: Mixed

    @property
    def rule(self) -> Rule:
        """Which tokens are compressed when."""
        return self.mixed.rule

    def trips(self, seed: int, model: LlamaConfig) -> Trips:
        """Every layer's own."""
        return self.mixed.trips(seed, model)

    def columns(self) -> Row:
        """For a row."""
        return {**self.setting.columns(), "preset": self.preset}

    def sizes(self, model: LlamaConfig, context: int) -> dict[str, float]:
        """Those of the uniform cache."""
        return self.setting.sizes(model, context)


def allocated(kind: str, setting: Setting) -> Allocated:
    """The cache of a kind ("mixed", "by head") that has the bytes of a uniform one.

    Raises:
      ValueError: it was not measured.
    """
    folder = results.COMMITTED / ("layer_ablation" + ".pre_rope" * setting.pre_rope)
    name = f"{kind} {setting.preset}"
    for row in where(results.read(folder).rows, preset=name):
        _, keys, _, values = row["allocation"].split(" ")
        return Allocated(name, setting, Mixed(tuple(map(int, keys + values)), setting.rule))
    raise ValueError(f"{folder} has no {name}")


def _trips(
    seed: int, model: LlamaConfig, short: bool = False
) -> tuple[dict[int, Trip], dict[int, Trip]]:
    """Of the keys and of the values, by bits."""
    made = []
    for key in jax.random.split(jax.random.key(seed)):
        coders = {b: Turbo(CodecConfig(b, code="trellis"), short) for b in (1, 2, 3, 4)}
        made.append({bits: coder.trip(key, model.head_dim) for bits, coder in coders.items()})
    return made[0], made[1]


def _only(trip: Trip, chosen: Array, x: Array) -> Array:
    return jnp.where(chosen[None, None, :, None], trip(x), x)


def shared_by_heads(
    shares: Sequence[Mapping[int, float]], parts: Sequence[Sequence[float]]
) -> list[dict[int, float]]:
    """Losses of heads: those of a part split as those of its heads at one number of bits.

    Args:
      shares: loss by bits, for each part.
      parts: for each part, the losses of its heads.
    """
    made = []
    for share, heads in zip(shares, parts, strict=True):
        made += [{b: loss * head / sum(heads) for b, loss in share.items()} for head in heads]
    return made


def remembered() -> list[Allocated]:
    """The mixed caches that needles and questions are held against."""
    small, smallest = (turbo(bits, 2, "trellis", window=128) for bits in (3, 2))
    more = turbo(2, 2, "trellis", window=128, pre_rope=True)
    return [
        *(allocated("by head", setting) for setting in (small, smallest, more)),
        allocated("mixed", smallest),
    ]
