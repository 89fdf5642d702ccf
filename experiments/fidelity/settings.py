"""Settings of a cache: coders of keys and values, window, sinks, block, centring; their bytes."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import jax

from experiments.fidelity.codecs import (
    Coder,
    Exact,
    Fp8,
    Kivi,
    PerToken,
    Turbo,
    VllmKey,
)
from experiments.fidelity.forcing import Trips
from experiments.fidelity.rule import Rule
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.cache.bytes import exact_bytes_per_token, planned_bytes
from turboquant_jax.models import LlamaConfig
from turboquant_jax.models.rope import inverse_frequencies
from turboquant_jax.quantizers.quantizer import Code

Held = TypeVar("Held", bound=Hashable)

LONG = 65536
"""Tokens of a long context, for which bytes are counted too."""


@dataclass(frozen=True)
class Setting:
    """One way to hold a cache; `exact_layers` stay in full precision, `pre_rope` as of `Rule`."""

    preset: str
    key: Coder
    value: Coder
    window: int = 64
    sinks: int = 4
    block: int = 64
    centred: bool = True
    pre_rope: bool = False
    exact_layers: tuple[int, ...] = ()

    @property
    def rule(self) -> Rule:
        """Which tokens are compressed when."""
        return Rule(self.window, self.sinks, self.block, self.centred, self.pre_rope)

    def trips(self, seed: int, model: LlamaConfig) -> Trips:
        """What keys and values go through: the rotations of a cache created with this seed."""
        keys = jax.random.split(jax.random.key(seed))
        pair = (
            self.key.trip(keys[0], model.head_dim),
            self.value.trip(keys[1], model.head_dim),
        )
        skipped = {layer % model.num_layers for layer in self.exact_layers}
        return lambda layer: (None, None) if layer in skipped else pair

    @property
    def first_layer(self) -> int:
        """The first layer that may be compressed."""
        return 0

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""
        return not all(isinstance(c, Exact | Fp8 | Kivi | PerToken | VllmKey) for c in self._coders)

    @property
    def _coders(self) -> tuple[Coder, Coder]:
        return self.key, self.value

    def columns(self) -> dict[str, object]:
        """What says how the cache was held, for a row."""
        turbo = next((c.config for c in self._coders if isinstance(c, Turbo)), None)
        names = dict.fromkeys(c.name for c in self._coders)
        return {
            "preset": self.preset,
            "bits_k": self.key.bits,
            "bits_v": self.value.bits,
            "code": " / ".join(names),
            "scale": turbo.scale if turbo else "",
            "rotation": turbo.rotation if turbo else "",
            "window": self.window,
            "sinks": self.sinks,
            "block": self.block,
            "centred": int(self.centred) + int(self.pre_rope),
        }

    def cache_config(self, model: LlamaConfig) -> CacheConfig | None:
        """The library's cache of this setting; None where it has none."""
        if self.exact_layers or not all(
            isinstance(c, Turbo) and not c.short_scale for c in self._coders
        ):
            return None
        return self._plain(model, *(c.config for c in self._coders if isinstance(c, Turbo)))

    def _plain(self, model: LlamaConfig, key: CodecConfig, value: CodecConfig) -> CacheConfig:
        return CacheConfig(
            model.num_layers,
            model.num_kv_heads,
            model.head_dim,
            key,
            value,
            block=self.block,
            window=self.window,
            sinks=self.sinks,
            center_keys=self.centred,
            rope_frequencies=tuple(inverse_frequencies(model)) if self.pre_rope else None,
        )

    def bytes_per_token(self, model: LlamaConfig, context: int) -> float:
        """True bytes of the whole cache of one sequence over its tokens, everything counted.

        Of a cache that the library does not have: the same cache of the library with the bytes of
        its vectors exchanged.
        """
        config = self.cache_config(model)
        if config is not None:
            return _planned(config, context) / context
        stand_in = CodecConfig(8, "identity")
        ours = Setting("", Turbo(stand_in), Turbo(stand_in))
        config = self._plain(model, stand_in, stand_in)
        heads = model.num_kv_heads * config.compressed_tokens(context)
        exact = [layer % model.num_layers for layer in self.exact_layers]
        layers = model.num_layers - len(set(exact))
        d = model.head_dim
        total = _planned(config, context)
        total -= model.num_layers * heads * sum(c.vector_bytes(d) for c in ours._coders)
        total += layers * heads * sum(c.vector_bytes(d) for c in self._coders)
        total += (model.num_layers - layers) * heads * 4 * d
        return total / context

    def sizes(self, model: LlamaConfig, context: int) -> dict[str, float]:
        """Bytes and ratios at the context and at 65,536 tokens."""
        exact = exact_bytes_per_token(
            CacheConfig(model.num_layers, model.num_kv_heads, model.head_dim)
        )
        here, deep = (self.bytes_per_token(model, length) for length in (context, LONG))
        return {
            "bytes_per_token": here,
            "ratio": exact / here,
            "bytes_per_token_64k": deep,
            "ratio_64k": exact / deep,
        }


@cache
def _planned(config: CacheConfig, context: int) -> int:
    return planned_bytes(config, 1, context).total


def turbo(
    key_bits, value_bits, code: Code = "scalar", short: bool = False, **options: Any
) -> Setting:
    """A setting of the library: bits of None mean full precision; options go where they belong."""
    codec = {
        name: options.pop(name) for name in ("rotation", "scale", "codebook") if name in options
    }

    def coder(bits) -> Coder:
        if bits is None:
            return Exact()
        return Turbo(CodecConfig(bits, code=code, **codec), short)

    setting = Setting("", coder(key_bits), coder(value_bits), **options)
    return replace(setting, preset=_name(setting, key_bits, value_bits, code, short, codec))


def _name(setting: Setting, key_bits, value_bits, code, short, codec) -> str:
    """K3 V2 trellis w64 and whatever is not as usual."""
    usual = Setting("", Exact(), Exact())
    words = [f"K{_bits(key_bits)} V{_bits(value_bits)}"]
    words += [code] * (code != "scalar") + ["scale8"] * short + [str(v) for v in codec.values()]
    words.append(f"w{setting.window}")
    if setting.sinks != usual.sinks:
        words.append(f"sinks{setting.sinks}")
    if setting.block != usual.block:
        words.append(f"block{setting.block}")
    words += ["uncentred"] * (not setting.centred) + ["pre-RoPE"] * setting.pre_rope
    return " ".join(words)


def _bits(bits) -> str:
    if bits is None:
        return "full"
    return str(bits) if isinstance(bits, int) else "+".join(f"{n}x{b}" for n, b in bits)


def peers(layers: int) -> list[Setting]:
    """The peers as they are, and with our window and sinks around their codes."""
    none: dict[str, Any] = dict(window=0, sinks=0, block=8, centred=False)
    edge = (0, 1, layers - 2, layers - 1)
    vllm = {bits: (VllmKey(bits), PerToken(bits, 64)) for bits in (4, 3)}
    made = []
    for bits, nc in ((2, 3), (4, 4)):
        kivi = Kivi(bits, True), Kivi(bits, False)
        made.append(Setting(f"KIVI int{bits}", *kivi, 128, 0, 32, False))
        made.append(Setting(f"vLLM {nc}bit_nc", *vllm[nc], **none, exact_layers=edge))
    for bits in (4, 2):
        per_token = PerToken(bits), PerToken(bits)
        made.append(Setting(f"per-token int{bits}", *per_token, **none))
        made.append(Setting(f"per-token int{bits} w128 sinks4", *per_token, 128, 4, 64, False))
    for bits in (4, 3):
        made.append(Setting(f"vLLM {bits}bit_nc, every layer", *vllm[bits], **none))
        made.append(Setting(f"vLLM {bits}bit_nc w128 sinks4", *vllm[bits], 128, 4, 64, False))
    made.append(Setting("fp8", Fp8(), Fp8(), **none))
    return made


def unique(settings: Sequence[Held]) -> list[Held]:
    """Each setting once, in order."""
    return list(dict.fromkeys(settings))


PAPERS = "plain 4 bits"
"""The setting of prompts of which the paper speaks: 4 bits alone, about its factor of 4."""


def for_prompts(layers: int) -> list[Setting]:
    """What needles and questions are held against: ours, then what others do, then the paper's."""
    held = {setting.preset: setting for setting in peers(layers)}
    return [
        replace(turbo(3, 3, "trellis", window=128), preset="balanced (K3 V3 trellis w128)"),
        replace(turbo(2, 2, "trellis", window=128), preset="max (K2 V2 trellis w128)"),
        replace(turbo(4, 4, "trellis", window=128), preset="lossless (K4 V4 trellis w128)"),
        replace(turbo(3, 2, "trellis", window=128), preset="compact (K3 V2 trellis w128)"),
        held["KIVI int2"],
        held["vLLM 3bit_nc"],
        turbo(2, 2, "trellis", window=128, pre_rope=True),
        replace(turbo(4, 4, window=0, sinks=0, centred=False), preset=PAPERS),
        replace(turbo(2, 2, window=0, sinks=0, centred=False), preset="plain 2 bits"),
    ]
