"""Caches of a calibration's file beside uniform ones: a preset's bytes, as heads share them."""

from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.fidelity.codecs import through
from experiments.fidelity.forcing import Trip, Trips
from experiments.fidelity.rule import Rule
from experiments.fidelity.settings import LONG, Setting, turbo
from experiments.harness.experiment import Row
from turboquant_jax.cache import CacheConfig, Calibration, CodecConfig, codec, fitting, presets
from turboquant_jax.cache.bytes import exact_bytes_per_token, planned_bytes
from turboquant_jax.cache.calibration_file import load_calibration
from turboquant_jax.models import Llama, LlamaConfig
from turboquant_jax.models.identity import require_calibrated
from turboquant_jax.models.rope import inverse_frequencies

Form = TypeVar("Form", bound=Hashable)
_NAMES: tuple[presets.Preset, ...] = tuple(reversed(get_args(presets.Preset)))


@dataclass(frozen=True)
class Calibrated:
    """The cache of a preset beside a calibration."""

    preset: str
    config: CacheConfig
    known: Calibration = field(compare=False, repr=False)

    is_random: bool = field(default=True, repr=False)
    first_layer: int = field(default=0, repr=False)

    @property
    def rule(self) -> Rule:
        """Which tokens are compressed when."""
        config = self.config
        return Rule(config.window, config.sinks, config.block, True, True)

    def columns(self) -> Row:
        """As of a `Setting`; bits are means."""
        assert self.config.allocation is not None
        keys, values = self.config.allocation.means
        return {
            "preset": self.preset,
            "bits_k": keys,
            "bits_v": values,
            "code": self.config.key.code + ", scale in 8 bits" * (self.config.scale_bits == 8),
            "scale": self.config.key.scale,
            "rotation": self.config.key.rotation,
            "window": self.config.window,
            "sinks": self.config.sinks,
            "block": self.config.block,
            "centred": 2,
        }

    def sizes(self, model: LlamaConfig, context: int) -> Row:
        """As of a `Setting`: the calibrated matrices count too."""
        exact = exact_bytes_per_token(self.config)
        here, deep = (
            planned_bytes(self.config, 1, length).total / length for length in (context, LONG)
        )
        return {
            "bytes_per_token": here,
            "ratio": exact / here,
            "bytes_per_token_64k": deep,
            "ratio_64k": exact / deep,
        }

    def trips(self, seed: int, model: LlamaConfig) -> Trips:
        """The rotations of a cache created with this seed; every head through its own codec.

        Codecs are made for all heads of the model, whoever has the format, so that one compiled
        function serves it in every layer of every such cache.
        """
        heads, made = self._heads, []
        short = (self.config.sinks, self.config.block) if self.config.scale_bits == 8 else False
        for side, key, basis in zip(
            ("key", "value"),
            jax.random.split(jax.random.key(seed)),
            (self.known.keys, self.known.values),
            strict=True,
        ):
            formats: dict[CodecConfig, codec.Codec] = {}
            for form in dict.fromkeys(getattr(each, side) for each in self.config.formats):
                every = None
                if form.scales != "group":
                    every = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), basis)
                formats[form] = codec.create(key, form, model.head_dim, None, every)
            made.append(formats)

        def at(layer: int) -> tuple[Trip, Trip]:
            key, value = (
                by_head(
                    {
                        form: partial(through, one, short=short, first=layer * model.num_kv_heads)
                        for form, one in formats.items()
                    },
                    [getattr(form, side) for form in heads[layer]],
                    compiled=tuple(formats) if layer == 0 else (),
                )
                for side, formats in zip(("key", "value"), made, strict=True)
            )
            return key, value

        return at

    @cached_property
    def _heads(self) -> tuple[tuple, ...]:
        """The format of every head of every layer."""
        count = self.config.num_kv_heads
        formats = self.config.formats
        return tuple(
            tuple(formats[place] for place in own * (count // len(own)))
            for own in self.config.places
        )


def by_head(
    trips: Mapping[Form, Trip], formats: Sequence[Form], compiled: Sequence[Form] = ()
) -> Trip:
    """Every head through the trip of its format.

    Several run side by side, because most of their time compiles, once; so do those that only other
    layers ask for, where they are to be `compiled`.
    """
    run = tuple(dict.fromkeys((*formats, *compiled)))
    if len(run) == 1:
        return trips[run[0]]

    def trip(x: Array) -> Array:
        out = x  # whole arrays, so that nothing is compiled for some of the heads
        for form, found in zip(run, _side_by_side([trips[form] for form in run], x), strict=True):
            chosen = jnp.asarray([own == form for own in formats])[None, None, :, None]
            out = jnp.where(chosen, found, out)
        return out

    return trip


def _side_by_side(trips: Sequence[Trip], x: Array) -> list[Array]:
    """Each on a thread of its own, with the precision of this one."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def run(trip: Trip) -> Array:
        with jax.default_matmul_precision(precision):
            return trip(x)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, trips))


def presets_of(file: str, model: Llama, windows: Sequence[int] = ()) -> list[Calibrated]:
    """The presets beside a calibration, the smallest first; then `max` with other windows.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a calibration of another model, or whose keys are not centred before RoPE.
    """
    known, config = load_calibration(file), model.config
    require_calibrated(known, config, model)
    study = known.study
    assert study is not None
    if study.centring != "pre_rope":
        raise ValueError(f"{file}: got keys centred {study.centring}, expected pre_rope")
    sizes = config.num_layers, config.num_kv_heads, config.head_dim
    options: dict[str, Any] = dict(study.codec)
    made = []
    asked: list[tuple[presets.Preset, int | None]] = [(name, None) for name in _NAMES]
    for name, window in [*asked, *(("max", window) for window in windows)]:
        plain = presets.preset(name, *sizes, tuple(inverse_frequencies(config)))
        key, value = (replace(own, **options) for own in (plain.key, plain.value))
        held = replace(plain, key=key, value=value, scale_bits=study.scale_bits)
        held = replace(held, window=presets.window(name, True) if window is None else window)
        chosen = fitting.fit_preset(held, study.losses, name)
        label = f"{name} by {Path(file).stem}" + ("" if window is None else f" w{window}")
        made.append(Calibrated(label, replace(held, allocation=chosen), known))
    return made


def uniform() -> list[Setting]:
    """The presets without a calibration, keys centred by their mean before RoPE."""
    made = []
    for name in _NAMES:
        key, value = (own.bits for own in presets.codecs(name))
        made.append(turbo(key, value, "trellis", window=presets.WINDOW, pre_rope=True))
    return made
