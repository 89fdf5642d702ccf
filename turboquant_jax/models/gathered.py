"""What a calibration gathers of a model on texts, and keeps in a file between them.

The first reading goes back through the layers (`sensitivity`). It sums the second moments of
centred keys, and of what meets them: of the queries, S_q, and of the gradients g of the keys, S_g,
which know how much depends on a key. Heads take their basis from

    S_q / tr S_q + 3 S_g / tr S_g.

RoPE turns keys and queries with their position, and a basis has to serve all of them: so every text
starts at a random position of those that the cache, and the model, may have.

What that is worth beside S_q alone is in `docs/calibration.md`: something to most heads, nothing to
the sum over them.

The second reading asks what bits lose. The keys, or the values, of a layer are compressed alone, in
every format of up to 3 bits, and then those of one head at 2 bits: what a format of the layer loses
is shared out to its heads as theirs at 2 bits are. Errors of more bits are small: they lose what 3
bits lose times the ratio of squared errors.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboquant_jax.cache import CacheConfig, CodecConfig, codec, files
from turboquant_jax.cache import calibration as calibrations
from turboquant_jax.cache.allocation import Bits, Losses, nested
from turboquant_jax.models.model import Llama
from turboquant_jax.models.sensitivity import alone, compiled, look_back
from turboquant_jax.quantizers.channels import Basis

_SIDES = ("keys", "values")
_LEAST = np.finfo(np.float64).tiny  # vectors that are all zero lose nothing

HEADS = 2
"""Bits of the format whose losses tell the heads of a layer apart."""
MEASURED = 3
"""Most bits of all channels whose loss is measured; that of more follows from squared errors."""
GRADIENTS = 3.0
"""Weight of the gradients' moment beside the queries', both of trace 1."""
EVERY = 20.0
"""Seconds within a text after which what was gathered is saved: one takes a large model minutes."""


class Gathered:
    """Sums over the texts, saved after each, and within a long one after some of its layers."""

    def __init__(
        self,
        path: Path,
        facts: str,
        config: CacheConfig,
        formats: tuple[tuple[Bits, ...], tuple[Bits, ...]],
        positions: int = 1,
    ):
        """Texts start at random places of so many `positions`."""
        self.path, self.facts, self.config, self.formats = path, facts, config, formats
        self.positions = positions
        heads, dim = (config.num_layers, config.num_kv_heads), config.head_dim
        moments = ("of_keys", "of_queries", "of_gradients")
        self.sums: dict[str, np.ndarray] = {n: np.zeros((*heads, dim, dim)) for n in moments}
        for side, names in zip(_SIDES, formats, strict=True):
            for name in ("layers", "squares"):
                self.sums[f"{side}.{name}"] = np.zeros((config.num_layers, len(names)))
            self.sums[f"{side}.heads"] = np.zeros(heads)
        # texts that were read, and layers of the next one that were compressed alone
        self.sums |= {name: np.zeros(1, np.int64) for name in ("read", "alone", "layers")}
        if self.path.is_file():
            found, arrays = files.read(self.path, "what a calibration gathered")
            if found.get("facts") != facts:
                raise ValueError(
                    f"{self.path}: got what a calibration of another model, of other texts or for "
                    "other settings gathered, expected this one's: remove it, or write elsewhere"
                )
            files.check(self.path, found, ("facts",), arrays)
            self.sums |= {name: np.array(array) for name, array in arrays.items()}
        self._saved = time.monotonic()

    def rest(self, name: str, texts: np.ndarray) -> Iterator[tuple[int, Array]]:
        """(number, tokens) of those that are not counted yet; each is saved once it is done."""
        for index in range(int(self.sums[name][0]), len(texts)):
            yield index, jnp.asarray(texts[index])
            self.sums[name] += 1
            self.sums["layers"][:] = 0
            self._save()

    def _save(self) -> None:
        files.write(self.path, self.sums, {"facts": self.facts})
        self._saved = time.monotonic()

    def basis(self) -> Basis:
        """Of the keys of every head."""
        names = ("of_keys", "of_queries", "of_gradients")
        of_keys, of_queries, of_gradients = (_normed(self.sums[name]) for name in names)
        return calibrations.from_moments(of_keys, of_queries + GRADIENTS * of_gradients)

    def moments(self, model: Llama, tokens: Array, key: Array) -> None:
        """Add those of a text."""
        for layer, seen, (g, _) in look_back(
            model, tokens, self.config, key, self._start(tokens, key)
        ):
            first = self.config.sinks  # what is never compressed says nothing
            of_keys, of_queries = _moments(seen.q[first:], seen.k[first:])
            _, of_gradients = _moments(g[first:], g[first:])
            for name, moment in (
                ("of_keys", of_keys), ("of_queries", of_queries), ("of_gradients", of_gradients)
            ):  # fmt: skip
                self.sums[name][layer] += np.asarray(moment, np.float64)

    def alone(
        self, model: Llama, tokens: Array, basis: Basis, key: Array, begin: Callable[[int], None]
    ) -> None:
        """Add what every format of every layer, and every head at 2 bits, loses on a text.

        `begin` is told each layer's number. Layers that are counted already are left out.
        """
        turns = jax.random.split(jax.random.fold_in(key, 1))
        start, codecs = self._start(tokens, key), (self.config.key, self.config.value)
        columns = [[i for i, b in enumerate(menu) if _is_measured(b)] for menu in self.formats]
        counts = [len(which) + self.config.num_kv_heads for which in columns]
        for layer, seen, lose in alone(model, tokens, self.config, start):
            if layer < self.sums["layers"][0]:
                continue
            begin(layer)
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], basis)
            off = []
            for side, (x, which) in enumerate(((seen.k, own), (seen.v, None))):
                menu = self.formats[side]
                made = _errors([codecs[side].of(bits) for bits in menu], turns[side], which, x)
                squares = jnp.sum(jnp.square(made), axis=(1, 2, 3))
                self.sums[f"{_SIDES[side]}.squares"][layer] += np.asarray(squares)
                heads = made[menu.index(HEADS)][None] * jnp.eye(x.shape[1])[:, None, :, None]
                every = jnp.concatenate([made[np.asarray(columns[side])], heads])
                before, after = sum(counts[:side]), sum(counts[side + 1 :])
                off.append(jnp.pad(every, ((before, after), (0, 0), (0, 0), (0, 0))))
            lost = np.split(lose((off[0], off[1])), counts[:1])
            for name, of_side, which in zip(_SIDES, lost, columns, strict=True):
                self.sums[f"{name}.layers"][layer, which] += of_side[: len(which)]
                self.sums[f"{name}.heads"][layer] += of_side[len(which) :]
            self.sums["layers"] += 1
            if time.monotonic() > self._saved + EVERY:
                self._save()

    def _start(self, tokens: Array, key: Array) -> int:
        """The position of the first token of a text."""
        most = max(1, self.positions - tokens.shape[0] + 1)
        return int(jax.random.randint(jax.random.fold_in(key, 2), (), 0, most))

    def losses(self) -> Losses:
        """Of every head in nats a token."""
        found = []
        for side, menu in zip(_SIDES, self.formats, strict=True):
            heads, squares = (self.sums[f"{side}.{name}"] for name in ("heads", "squares"))
            layers = self.sums[f"{side}.layers"] / max(1, self.sums["alone"][0])
            for column, bits in enumerate(menu):
                if not _is_measured(bits):
                    known = menu.index(MEASURED)
                    smaller = squares[:, column] / np.maximum(squares[:, known], _LEAST)
                    layers[:, column] = layers[:, known] * smaller
            whole = heads.sum(axis=1, keepdims=True)
            even = np.full_like(heads, 1 / heads.shape[1])
            share = np.divide(heads, whole, out=even, where=whole > 0)
            found.append(share[:, :, None] * layers[:, None, :])
        return Losses(*self.formats, *map(nested, found))


def _errors(
    forms: Sequence[CodecConfig], key: Array, basis: Basis | None, x: Float[Array, "T K H"]
) -> Float[Array, "formats T K H"]:
    """`error` in every format, side by side: most of the first time compiles."""
    with ThreadPoolExecutor() as pool:
        return jnp.stack(list(pool.map(lambda form: error(form, key, basis, x), forms)))


def _is_measured(bits: Bits) -> bool:
    return not isinstance(bits, int) or bits <= MEASURED


@partial(compiled, static_argnames="form")
def error(
    form: CodecConfig, key: Array, basis: Basis | None, x: Float[Array, "T K H"]
) -> Float[Array, "T K H"]:
    """What comes back of vectors of a layer, less what went in; the basis is that of its heads."""
    made = codec.create(key, form, x.shape[2], None, basis if form.scales != "group" else None)
    rows = jnp.arange(x.shape[1], dtype=jnp.int32)
    return made.unrotate(rows, made.dequantize(made.quantize(rows, x))) - x


def _normed(moment: np.ndarray) -> np.ndarray:
    """Of trace 1, but for zero."""
    size = np.trace(moment, axis1=-2, axis2=-1)[..., None, None]
    return np.divide(moment, size, out=np.zeros_like(moment), where=size > 0)


_moments = compiled(calibrations.moments)
