"""Calibration of a model: bases of its heads, what every format loses, the allocation for a target.

Two readings of the texts. The first gathers the second moments of queries and centred keys, from
which the bases follow. The second goes back through the layers (`models.sensitivity`): with g the
gradients and d the errors of a head's keys, or values, in a format, <g, d> summed over the tokens
and squared is twice the loss, but from one text it is a guess with the spread of a square. The sum
of the squares has little spread, and misses that errors of the same token agree, most of all in the
first layers. So heads and formats are told apart by the sum of squares, and every layer's keys, or
values, are scaled by how much larger the square of the sum is, over all texts, heads and formats.

What was gathered is saved after every text; the same call goes on from there.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboquant_jax.cache import CacheConfig, CodecConfig, codec, files, fitting
from turboquant_jax.cache import calibration as calibrations
from turboquant_jax.cache.allocation import Allocation, Bits, Losses
from turboquant_jax.cache.calibration import Calibration, Study
from turboquant_jax.cache.calibration_file import save_calibration
from turboquant_jax.models import Checkpoint, Llama
from turboquant_jax.models.evaluate import compare
from turboquant_jax.models.identity import key_digest
from turboquant_jax.models.sensitivity import Seen, final, look_back, read
from turboquant_jax.quantizers.channels import Basis

Progress = Callable[[str, int, int], None]
"""What is being done, steps done, steps in all."""


@dataclass(frozen=True)
class Text:
    """Token ids, and where they are from."""

    name: str
    digest: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
      config: of the cache: all but its bits.
      ratio, kl: the target, one of them: how many times smaller than full precision, or the loss.
      capacity: tokens of the cache whose bytes count.
      context: tokens of a text: of the windows that the texts are cut into.
      windows: most of them, spread evenly over the texts; one more is kept to judge.
      seed: of rotations and of what is drawn.
    """

    config: CacheConfig
    ratio: float | None = None
    kl: float | None = None
    capacity: int = 65_536
    context: int = 512
    windows: int = 16
    seed: int = 0

    def __post_init__(self):
        if (self.ratio is None) == (self.kl is None):
            raise ValueError(f"target: got {self.ratio=} and {self.kl=}, expected one of them")

    @property
    def target(self) -> str:
        """In words."""
        if self.ratio is None:
            return f"KL at most {self.kl:g}, fewest bytes at {self.capacity:,} tokens"
        return f"{self.ratio:g} times at {self.capacity:,} tokens, least KL"


def menu(head_dim: int) -> tuple[tuple[Bits, ...], tuple[Bits, ...]]:
    """Formats of keys and of values that a head may get: bits, and for keys groups of channels."""
    bits, quarter = (1, 2, 3, 4), head_dim // 4
    if head_dim % 4:
        return bits, bits
    splits = (
        ((2 * quarter, 2), (2 * quarter, 1)),
        ((quarter, 4), (quarter, 2), (2 * quarter, 1)),
        ((quarter, 4), (quarter, 3), (2 * quarter, 2)),
    )
    return (*bits, *splits), bits


def windows(texts: Sequence[Text], context: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, context] that choose, and those that judge: the last window of every text.

    Raises:
      ValueError: texts of which none has two windows.
    """
    choosing, judging = [], []
    for text in texts:
        count = len(text.tokens) // context
        whole = np.reshape(text.tokens[: count * context], (count, context)).astype(np.int32)
        choosing += list(whole[:-1])
        judging += list(whole[1:][-1:])
    if not choosing:
        raise ValueError(f"texts: got none of two times {context} tokens, expected one")
    chosen = np.unique(np.linspace(0, len(choosing) - 1, most).astype(int))
    return np.stack(choosing)[chosen], np.stack(judging)


def calibrate(
    checkpoint: Checkpoint, texts: Sequence[Text], plan: Plan, out: Path, progress: Progress
) -> Calibration:
    """Calibrate, and save it at `out`. What is gathered lies beside it, in `out`.partial.

    Raises:
      ValueError: texts that are too short, a target that cannot be reached, and a file beside
        `out` that another call left.
    """
    model, config = checkpoint.model, plan.config
    choosing, judging = windows(texts, plan.context, plan.windows)
    formats = menu(config.head_dim)
    gathered = _Gathered(out, _facts(checkpoint, texts, plan), config, formats)
    steps = 2 * len(choosing) + len(judging)
    for done, tokens in gathered.rest("read", choosing):
        progress("read", done, steps)
        gathered.moments(model, tokens)
    basis = calibrations.from_moments(gathered.mean("of_keys"), gathered.mean("of_queries"))
    for done, tokens in gathered.rest("heard", choosing):
        progress("losses of every format", len(choosing) + done, steps)
        gathered.losses(model, tokens, basis, jax.random.fold_in(jax.random.key(plan.seed), done))
    losses = gathered.summed()
    known, scale = Calibration(keys=basis), 1.0
    while True:
        if plan.ratio is not None:
            chosen = fitting.fit_ratio(config, losses, plan.ratio, plan.capacity)
        else:
            assert plan.kl is not None
            chosen = fitting.fit_loss(config, losses, plan.kl / scale, plan.capacity)
        predicted, found = losses.of(chosen), []
        for done, tokens in enumerate(judging):
            progress("judge the allocation", 2 * len(choosing) + done, steps)
            found.append(judge(model, tokens, config, chosen, known, plan.seed))
        measured = float(np.mean(found))
        if plan.kl is None or measured <= plan.kl or scale >= 16:
            break
        scale *= max(1.1, measured / plan.kl)
    study = Study(
        checkpoint.name,
        key_digest(model),
        tuple((text.name, text.digest, len(text.tokens)) for text in texts),
        tuple((name, version(name)) for name in ("turboquant-jax", "jax")),
        _rule(config, plan),
        _centring(config),
        losses,
        plan.target,
        chosen,
        predicted,
        measured,
    )
    known = replace(known, study=study)
    save_calibration(known, out)
    gathered.path.unlink(missing_ok=True)
    return known


def judge(
    model: Llama,
    tokens: Int[np.ndarray, " T"],
    config: CacheConfig,
    allocation: Allocation,
    known: Calibration,
    seed: int = 0,
) -> float:
    """KL in nats a token of a text, teacher-forced, every layer as the allocation has it."""
    ids = jnp.asarray(tokens, jnp.int32)
    pairs = replace(config, allocation=allocation)
    keys = jax.random.split(jax.random.key(seed))

    def errors(layer: int, seen: Seen):
        forms = [pairs.formats[place] for place in pairs.places[layer]]
        forms *= config.num_kv_heads // len(forms)
        found = []
        for side, key, x, basis in zip(
            ("key", "value"), keys, (seen.k, seen.v), (known.keys, known.values), strict=True
        ):
            own = None if basis is None else jax.tree.map(lambda leaf: leaf[layer], basis)
            codecs = [getattr(form, side) for form in forms]
            made = {one: error(one, key, own, x) for one in dict.fromkeys(codecs)}
            found.append(jnp.stack([made[one][:, head] for head, one in enumerate(codecs)], 1))
        return found[0], found[1]

    *_, (_, exact) = read(model, ids, config)
    *_, (_, other) = read(model, ids, config, errors)
    return float(np.mean(compare(model, ids[None], final(model, exact), final(model, other)).kl))


@partial(jax.jit, static_argnames="form")
def error(
    form: CodecConfig, key: Array, basis: Basis | None, x: Float[Array, "T K H"]
) -> Float[Array, "T K H"]:
    """What comes back of vectors of a layer, less what went in; the basis is that of its heads."""
    made = codec.create(key, form, x.shape[2], None, basis if form.scales != "group" else None)
    rows = jnp.arange(x.shape[1], dtype=jnp.int32)
    return made.unrotate(rows, made.dequantize(made.quantize(rows, x))) - x


class _Gathered:
    """Sums over the texts, saved after each of them."""

    def __init__(self, out: Path, facts: str, config: CacheConfig, formats):
        self.path = out.with_name(out.name + ".partial")
        self.facts, self.config, self.formats = facts, config, formats
        heads, dim = (config.num_layers, config.num_kv_heads), config.head_dim
        self.sums = {name: np.zeros((*heads, dim, dim)) for name in ("of_keys", "of_queries")}
        for side, names in zip(("keys", "values"), formats, strict=True):
            for kind in ("squares", "square"):
                self.sums[f"{side}.{kind}"] = np.zeros((*heads, len(names)))
        self.sums |= {"read": np.zeros(1, np.int64), "heard": np.zeros(1, np.int64)}
        if self.path.is_file():
            found, arrays = files.read(self.path, "what a calibration gathered")
            if found.get("facts") != facts:
                raise ValueError(
                    f"{self.path}: got what a calibration of another model, of other texts or for "
                    "other settings gathered, expected this one's: remove it, or write elsewhere"
                )
            files.check(self.path, found, ("facts",), arrays)
            self.sums = {name: np.array(array) for name, array in arrays.items()}

    def rest(self, name: str, texts: np.ndarray):
        """(number, tokens) of those that are not counted yet; each is saved once it is done."""
        for index in range(int(self.sums[name][0]), len(texts)):
            yield index, jnp.asarray(texts[index])
            self.sums[name] += 1
            files.write(self.path, self.sums, {"facts": self.facts})

    def mean(self, name: str) -> np.ndarray:
        """Of a moment over the texts, which are equally long."""
        return self.sums[name] / self.sums["read"][0]

    def moments(self, model: Llama, tokens: Array) -> None:
        """Add those of a text."""
        for layer, (seen, _) in enumerate(read(model, tokens, self.config)):
            first = self.config.sinks  # what is never compressed says nothing
            of_keys, of_queries = _moments(seen.q[first:], seen.k[first:])
            self.sums["of_keys"][layer] += np.asarray(of_keys, np.float64)
            self.sums["of_queries"][layer] += np.asarray(of_queries, np.float64)

    def losses(self, model: Llama, tokens: Array, basis: Basis, key: Array) -> None:
        """Add what every format loses on a text."""
        drawn, *rotations = jax.random.split(key, 3)
        for layer, seen, gradients in look_back(model, tokens, self.config, drawn):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], basis)
            for side, turn, x, g, menu, which in zip(
                ("key", "value"), rotations, (seen.k, seen.v), gradients, self.formats, (own, None),
                strict=True,
            ):  # fmt: skip
                for column, bits in enumerate(menu):
                    form = getattr(self.config, side).of(bits)
                    squares, square = _products(error(form, turn, which, x), g)
                    self.sums[f"{side}s.squares"][layer, :, column] += np.asarray(squares)
                    self.sums[f"{side}s.square"][layer, :, column] += np.asarray(square)

    def summed(self) -> Losses:
        """Losses in nats a token: squares, scaled by the layer's squares of sums."""
        found = []
        for side in ("keys", "values"):
            squares, square = (
                self.sums[f"{side}.{kind}"] / self.sums["heard"][0]
                for kind in ("squares", "square")
            )
            unit = np.maximum(squares.sum(axis=(0, 1)), 1e-300)  # every format counts alike
            agreed, alone = ((x / unit).sum(axis=(1, 2)) for x in (square, squares))
            scale = np.divide(agreed, alone, out=np.ones_like(alone), where=alone > 0)
            found.append(squares * scale[:, None, None])
        keys, values = (tuple(tuple(map(tuple, layer.tolist())) for layer in x) for x in found)
        return Losses(*self.formats, keys, values)


_moments = jax.jit(calibrations.moments)


@jax.jit
def _products(off: Float[Array, "T K H"], g: Float[Array, "T K H"]):
    """Halves of the sum of the squares of <g, d>, and of the square of their sum, by T."""
    each = jnp.sum(off * g, axis=2)
    return jnp.mean(each * each, axis=0) / 2, jnp.sum(each, axis=0) ** 2 / (2 * each.shape[0])


def _facts(checkpoint: Checkpoint, texts: Sequence[Text], plan: Plan) -> str:
    """What has to be the same for a call to go on where another stopped; the target may change."""
    named = replace(plan, ratio=None, kl=1.0, capacity=0)
    said = [asdict(named), menu(plan.config.head_dim), [[t.name, t.digest] for t in texts]]
    said += [checkpoint.name, key_digest(checkpoint.model), version("turboquant-jax")]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _rule(config: CacheConfig, plan: Plan) -> tuple[tuple[str, int], ...]:
    names = ("sinks", "window", "block")
    return (*((name, getattr(config, name)) for name in names), ("context", plan.context))


def _centring(config: CacheConfig) -> str:
    if not config.center_keys:
        return "none"
    return "stored" if config.rope_frequencies is None else "pre_rope"
