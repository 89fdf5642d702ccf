"""Calibration of a model: bases of its heads, what every format loses, the allocation for a target.

`models.gathered` reads the texts, some of them twice. What it gathers is saved after every text,
and within a long one: the same call goes on from there.
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
from jaxtyping import Int

from turboquant_jax.cache import CacheConfig, fitting
from turboquant_jax.cache.allocation import Allocation, Bits
from turboquant_jax.cache.calibration import Calibration, Study
from turboquant_jax.cache.calibration_file import save_calibration
from turboquant_jax.models import Checkpoint, Llama
from turboquant_jax.models.evaluate import compare
from turboquant_jax.models.gathered import Gathered, error
from turboquant_jax.models.identity import key_digest
from turboquant_jax.models.sensitivity import Seen, final, first_prediction, read

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
      alone: windows among them on which layers and heads are compressed alone. Each of them
        takes layers x (formats of up to 3 bits + 2 heads) passes through half of the layers.
      seed: of rotations and of what is drawn.
      tensor: devices that share the heads: each has as many of every format.
    """

    config: CacheConfig
    ratio: float | None = None
    kl: float | None = None
    capacity: int = 65_536
    context: int = 512
    windows: int = 16
    alone: int = 1
    seed: int = 0
    tensor: int = 1

    def __post_init__(self):
        if self.config.num_kv_heads % self.tensor:
            raise ValueError(
                f"tensor: got {self.tensor}, expected a divisor of the "
                f"{self.config.num_kv_heads} kv heads"
            )
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
    bits, quarter = (1, 2, 3, 4, 5, 6), head_dim // 4
    if head_dim % 4:
        return bits, bits
    splits = (
        ((quarter, 3), (quarter, 1), (2 * quarter, 1)),
        ((quarter, 4), (quarter, 2), (2 * quarter, 1)),
        ((quarter, 4), (2 * quarter, 2), (quarter, 1)),
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
    first_prediction(config, plan.context)  # a window must be long enough, before any is read
    choosing, judging = windows(texts, plan.context, plan.windows)
    formats = menu(config.head_dim)
    key = partial(jax.random.fold_in, jax.random.key(plan.seed))
    gathered = Gathered(
        out.with_name(out.name + ".partial"), _facts(checkpoint, texts, plan), config, formats,
        min(plan.capacity, checkpoint.config.max_position),
    )  # fmt: skip
    alone = choosing[np.unique(np.linspace(0, len(choosing) - 1, plan.alone).astype(int))]
    read = len(choosing) + len(alone)
    steps = read + len(judging)
    for done, tokens in gathered.rest("read", choosing):
        progress("moments of keys and queries", done, steps)
        gathered.moments(model, tokens, key(done))
    basis = gathered.basis()
    for done, tokens in gathered.rest("alone", alone):
        at = partial(_at_layer, progress, config.num_layers, len(choosing) + done, steps)
        gathered.alone(model, tokens, basis, key(done), at)
    losses = gathered.losses()
    known, scale = Calibration(keys=basis), 1.0
    while True:
        if plan.ratio is not None:
            chosen = fitting.fit_ratio(config, losses, plan.ratio, plan.capacity, plan.tensor)
        else:
            assert plan.kl is not None
            chosen = fitting.fit_loss(config, losses, plan.kl / scale, plan.capacity, plan.tensor)
        predicted, found = losses.of(chosen), []
        for done, tokens in enumerate(judging):
            progress("judge the allocation", read + done, steps)
            found.append(judge(model, tokens, config, chosen, known, plan.seed))
        measured = float(np.mean(found))
        if plan.kl is None or measured <= plan.kl:
            break
        scale *= max(1.1, measured / plan.kl)
    study = Study(
        checkpoint.name,
        key_digest(model),
        tuple((text.name, text.digest, len(text.tokens)) for text in texts),
        tuple((name, version(name)) for name in ("turboquant-jax", "jax")),
        _rule(config, plan),
        tuple((name, getattr(config.key, name)) for name in ("code", "scales")),
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
    """KL in nats a token of a text, teacher-forced, every layer as the allocation has it.

    The mean over the predictions that find tokens compressed.
    """
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
    found = compare(model, ids[None], final(model, exact), final(model, other)).kl
    return float(np.mean(found[first_prediction(config, len(tokens)) :]))


def _at_layer(progress: Progress, layers: int, done: int, steps: int, layer: int) -> None:
    progress(f"losses of layer {layer + 1} of {layers} and of its heads alone", done, steps)


def _facts(checkpoint: Checkpoint, texts: Sequence[Text], plan: Plan) -> str:
    """What has to be the same for a call to go on where another stopped; the target may change."""
    positions = min(plan.capacity, checkpoint.config.max_position)
    named = asdict(replace(plan, ratio=None, kl=1.0, capacity=positions))
    del named["tensor"]
    said = [named, menu(plan.config.head_dim), [[t.name, t.digest] for t in texts]]
    said += [checkpoint.name, key_digest(checkpoint.model), version("turboquant-jax")]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _rule(config: CacheConfig, plan: Plan) -> tuple[tuple[str, int], ...]:
    held = ("sinks", "window", "block", "scale_bits")
    read = ("context", "windows", "alone")
    return tuple(
        (name, getattr(own, name))
        for own, names in ((config, held), (plan, read))
        for name in names
    )


def _centring(config: CacheConfig) -> str:
    if not config.center_keys:
        return "none"
    return "stored" if config.rope_frequencies is None else "pre_rope"
