"""Speculative decoding: tokens per second with drafts, over those without.

`constructed`: random weights of Llama-3-8B in bfloat16, one sequence of 8,192 tokens, and a head
that makes the next token known, so that drafts are right by construction: each token of a draft of
4, independently, with probability p. Then a pass makes (1 - p**5) / (1 - p) tokens, 1.94, 2.77 and
4.10 for 0.5, 0.7 and 0.9, unless it ends where a block of the cache is complete.

`ngram`: SmolLM2-135M-Instruct in bfloat16 answers prompts that have their answer in them, greedily,
with drafts of 4 tokens by prompt look-up. `equal` are tokens before the first that differs from the
answer without drafts, which rounding decides. Both caches have 4 bits and the mean before RoPE;
acceptance is of drafted tokens; times are of one compiled loop behind the prompt. `attention` is
what attends to the tokens of a pass.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.experiment import QUESTION, Claim, Row, Track, option, where
from experiments.harness.journal import open_journal
from experiments.harness.plotting import COLOURS, Figure, label, panels
from experiments.harness.statistics import met
from experiments.speed import constructed_drafts
from experiments.speed.repeating_prompts import PROMPTS
from experiments.speed.speed_claims import OURS
from pallas_kernels.primitives.limits import MAX_QUERIES
from turboquant_jax import cache
from turboquant_jax.attention import Projection
from turboquant_jax.cache import Cache, CacheConfig, CodecConfig
from turboquant_jax.cache.choose import choose_attention
from turboquant_jax.implementation import Implementation
from turboquant_jax.models import PRESETS, Checkpoint, Llama, LlamaConfig, load, speculate, timing
from turboquant_jax.models.decoding import refuse_overflow
from turboquant_jax.models.drafts import Drafter, look_up
from turboquant_jax.models.generate import Past, decode, pad_prompts, prefill
from turboquant_jax.models.options import GREEDY, Sampling
from turboquant_jax.models.past import compressed
from turboquant_jax.models.rope import centring

NEEDS = "an NVIDIA GPU of 80 GB for its full size"
LEAST = {0.5: 1.6, 0.7: 2.2, 0.9: 3.0}
BITS, CONSTRUCTED = 4, "constructed"


@dataclass(frozen=True)
class Config:
    """What to run."""

    tasks: tuple[str, ...] = option((CONSTRUCTED, *PROMPTS), "constructed, and prompts")
    probabilities: tuple[float, ...] = option(tuple(LEAST), "of a constructed draft's token")
    drafts: int = option(4, "tokens of a draft")
    model: str = option("llama-3-8b", "preset whose sizes the random weights have")
    layers: int = option(0, "layers instead of the preset's, if not 0")
    context: int = option(8192, "tokens before constructed drafts")
    tokens: int = option(256, "most tokens of an answer")
    repeats: int = option(3, "timed answers")
    attention: str = option("", "what attends to tokens of a draft, if not what is chosen")
    checkpoint: str = option("", "GGUF file of the prompts' model, if not SmolLM2", path=True)
    seconds: float = option(0.0, "start no case after so long, 0 for never")


SMOKE = Config((CONSTRUCTED,), (0.7,), model="smollm2-135m", layers=1, context=150, tokens=20)


@dataclass(frozen=True)
class Asked:
    """A decoder and a past that has read a prompt, of which every answer gets a copy."""

    model: Llama
    past: Past[Cache]
    logits: jax.Array
    positions: jax.Array
    state: Cache
    tokens: int
    sampling: Sampling = GREEDY

    def call(self) -> tuple[Any, ...]:
        """The arguments of `decode`, whose state is donated."""
        keys = jax.random.split(jax.random.key(0), 1)
        copied = jax.tree.map(jnp.copy, (self.logits, self.positions, keys, self.state))
        return (*jax.block_until_ready((self.model, *copied)), self.past)

    def answer(self) -> tuple[float, np.ndarray]:
        """Seconds, and tokens, without drafts."""
        seconds, made = _timed(decode, *self.call(), max_tokens=self.tokens, sampling=self.sampling)
        refuse_overflow(made.state)
        return seconds, np.asarray(made.tokens[0, : int(made.counts[0])])

    def answer_with(self, drafter: Drafter, own: Any) -> tuple[float, speculate.Speculation]:
        """Seconds, and what was made, with drafts."""
        seconds, made = _timed(
            speculate.decode, *self.call(), drafter, jax.block_until_ready(own),
            max_tokens=self.tokens, sampling=self.sampling,
        )  # fmt: skip
        refuse_overflow(made.generation.state)
        return seconds, made


def _timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = jax.block_until_ready(function(*arguments, **options))
    return time.perf_counter() - begin, made


def run(config: Config, track: Track) -> Iterator[Row]:
    """Each task without drafts and with them."""
    journal, bench = open_journal("speculation", config, ("tasks", "probabilities")), Bench(config)
    cases: list[tuple[str, float | None]] = []
    for task in config.tasks:
        cases += [(task, p) for p in (config.probabilities if task == CONSTRUCTED else (None,))]
    for task, p in track(cases, "speculation"):
        yield from journal.measure(f"{task} {p}", functools.partial(bench.measure, task, p))


class Bench:
    """Holds the decoders on the device, and times one case at a time."""

    def __init__(self, config: Config):
        self.config = config
        self.past = past_of(config.attention)

    def measure(self, task: str, p: float | None) -> list[Row]:
        """The row of a case.

        Raises:
          ValueError: an answer to constructed drafts that is not the one that was constructed.
        """
        count = self.config.drafts
        if p is None:
            asked, text = self.prompt(task)
            plain = _median(asked.answer, self.config.repeats)
            row = self._compare(asked, plain, look_up(count), lambda _: jnp.copy(text))
            return [{"draft": "ngram", "task": task} | row]
        asked = self.constructed
        step, vocab = constructed_drafts.step_of(asked.model), asked.model.config.vocab_size
        drafter = constructed_drafts.drafter(count, step, vocab)
        own = lambda repeat: (jnp.float32(p), jax.random.key(repeat))  # noqa: E731
        row = self._compare(asked, self._known_answer, drafter, own)
        known = step * np.arange(asked.tokens) % vocab
        if not (row["equal"] == len(known) and (self._known_answer[1] == known).all()):
            raise ValueError(f"constructed drafts: got another answer than was constructed: {row}")
        return [{"draft": CONSTRUCTED, "task": f"p = {p:g}"} | row]

    @functools.cached_property
    def constructed(self) -> Asked:
        """The decoder whose next token is known, behind random codes."""
        config, preset = self.config, PRESETS[self.config.model]
        llama = dataclasses.replace(preset, num_layers=config.layers or preset.num_layers)
        model = constructed_drafts.predictable(llama)
        capacity = config.context + config.tokens + 1
        state = timing.filled_cache(cache_config(llama), 1, config.context, capacity)
        logits = jax.nn.one_hot(jnp.zeros(1, jnp.int32), llama.vocab_size)
        return Asked(model, self.past, logits, state.lengths, state, config.tokens)

    @functools.cached_property
    def _known_answer(self) -> tuple[float, np.ndarray]:
        return _median(self.constructed.answer, self.config.repeats)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """That of the prompts."""
        return load(self.config.checkpoint or None, jnp.bfloat16, stacked=False)

    def prompt(self, task: str) -> tuple[Asked, jax.Array]:
        """A prompt that was read, and its text with room for the answer."""
        tokenizer, model = self.checkpoint.tokenizer, self.checkpoint.model
        said = ([{"role": "user", "content": text}] for text in PROMPTS.values())
        every = dict(zip(PROMPTS, map(tokenizer.encode_chat, said), strict=True))
        room = max(map(len, every.values())) + self.config.tokens  # of all: compiled once
        empty = cache.create(cache_config(model.config), 1, room, key=jax.random.key(0))
        row = list(every).index(task)
        text, lengths = (jnp.asarray(x[row : row + 1]) for x in pad_prompts([*every.values()]))
        logits, state = prefill(model, text, lengths, empty, self.past)
        refuse_overflow(state)
        ends = Sampling(eos_ids=tuple(tokenizer.eos_ids))
        asked = Asked(model, self.past, logits, lengths, state, self.config.tokens, ends)
        return asked, jnp.pad(text, ((0, 0), (0, room - text.shape[1])))

    def _compare(
        self,
        asked: Asked,
        plain: tuple[float, np.ndarray],
        drafter: Drafter,
        own: Callable[[int], Any],
    ) -> Row:
        """Answers with drafts beside one without; `own(i)` is the drafter's state of answer i."""
        repeats, (without, tokens) = self.config.repeats, plain
        asked.answer_with(drafter, own(0))  # compiles and loads
        answers = [asked.answer_with(drafter, own(i)) for i in range(repeats)]
        made = [np.asarray(x.generation.tokens[0, : len(tokens)]) for _, x in answers]
        differs = [np.flatnonzero(x != tokens) for x in made]
        counts, passes, drafted, accepted = (
            sum(int(x[0]) for x in column)
            for column in zip(
                *((x.generation.counts, x.passes, x.drafted, x.accepted) for _, x in answers),
                strict=True,
            )
        )
        fast, slow = counts / sum(seconds for seconds, _ in answers), len(tokens) / without
        queries, cap = drafter.tokens + 1, asked.model.config.attention_softcap
        several = choose_attention(
            asked.state, queries, cap, _implementation(self.config.attention)
        )
        return {
            "acceptance": accepted / max(drafted, 1),
            "tokens_per_second": fast,
            "ratio_to_plain": fast / slow,
            "tokens_per_pass": counts / passes,
            "plain_tokens_per_second": slow,
            "tokens": len(tokens),
            "equal": min(int(x[0]) if x.size else len(tokens) for x in differs),
            "attention": several.attend,
        }


def _median(
    answer: Callable[[], tuple[float, np.ndarray]], repeats: int
) -> tuple[float, np.ndarray]:
    """Of the seconds, after an answer that does not count."""
    answer()
    seconds, made = zip(*(answer() for _ in range(repeats)), strict=True)
    return statistics.median(seconds), made[0]


@functools.cache
def past_of(name: str) -> Past[Cache]:
    """What is chosen, but for the tokens of a draft where there is a name."""
    one, several = compressed(), compressed(_implementation(name))

    def attend(state: Cache, layer: jax.Array, projection: Projection) -> tuple[jax.Array, Cache]:
        count = projection.qkv.shape[1]
        return (several if 1 < count <= MAX_QUERIES else one).attend(state, layer, projection)

    return dataclasses.replace(one, attend=attend)


def _implementation(name: str) -> Implementation | None:
    return cast(Implementation, name) if name else None


def cache_config(model: LlamaConfig) -> CacheConfig:
    """The default cache of a decoder at 4 bits."""
    sizes = model.num_layers, model.num_kv_heads, model.head_dim
    return CacheConfig(*sizes, CodecConfig(BITS), CodecConfig(BITS), **centring(model))


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Constructed drafts against the aims; real ones as they are."""
    found = []
    for p, least in LEAST.items():
        for row in where(rows, draft=CONSTRUCTED, task=f"p = {p:g}"):
            ratio, ideal = row["ratio_to_plain"], row["tokens_per_pass"]
            found.append(
                Claim(
                    OURS,
                    f"drafts of 4 accepted with probability {p:g}: at least {least} times the "
                    "tokens per second of decoding without",
                    f"{ratio:.2f} times, {row['tokens_per_second']:.0f} tokens a second; "
                    f"{ideal:.2f} tokens a pass",
                    met(ratio >= least),
                )
            )
    for row in where(rows, draft="ngram"):
        ratio = row["ratio_to_plain"]
        found.append(
            Claim(
                QUESTION,
                f"{row['task']}: drafts by prompt look-up are faster than none",
                f"{ratio:.2f} times, {row['tokens_per_second']:.0f} tokens a second; "
                f"{row['acceptance']:.0%} of drafted tokens accepted, "
                f"{row['tokens_per_pass']:.2f} tokens a pass",
                "holds" if ratio > 1 else "does not hold",
            )
        )
    return found


def figure(rows: Sequence[Row]) -> Figure:
    """Times the speed without drafts, with the tokens of a pass marked."""
    made, axes = panels(1, 1, 6.0, 3.4)
    axis = axes[0][0]
    for place, row in enumerate(rows):
        colour = COLOURS[0] if row["draft"] == CONSTRUCTED else COLOURS[2]
        axis.bar(place, row["ratio_to_plain"], 0.6, color=colour)
        limit = row["tokens_per_pass"]
        axis.plot((place - 0.3, place + 0.3), (limit, limit), color="#222222", lw=1.5)
    axis.axhline(1, color="#7f7f7f", lw=1, ls=":")
    axis.set_xticks(range(len(rows)), [f"{row['draft']}\n{row['task']}" for row in rows])
    axis.grid(False, axis="x")
    label(axis, "the mark: tokens of a pass", "drafts and task", "times tokens a second", False)
    return made
