"""What attention meets on a text, and how much the predictions depend on every key and value.

Small errors d_j of the keys, or values, of tokens j change the predictions p of a text by

    KL = 1/2 E (sum_j <g_j, d_j>)^2,

where g_j is the gradient of the log-likelihood of a text that is drawn, token by token, from p
itself. Only the queries that find token j compressed count. So one pass back over a text says what
any error of any head would cost, and no pass is made with it.

That is for small errors. Those of 1 to 3 bits are not: they cost more than that in the first layers
and less in the last. So what bits lose is measured (`alone`).

The decoder is run layer by layer: a layer is compiled once, whatever their number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, Int, Key

from turboquant_jax.cache import CacheConfig, pre_rope
from turboquant_jax.cache.layout import edge
from turboquant_jax.models.model import Layer, Llama, rms_norm, unstack
from turboquant_jax.models.rope import rotation_angles

_ROWS = 256  # of the logits at a time
# A pass runs a few times: XLA for GPUs would compile dozens of kernels for each of its products to
# find the fastest, which takes several times as long as all passes.
compiled = partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False})
ASKED = 128
"""Predictions of a text, at most, whose change says what errors lose (`alone`)."""

Errors = tuple[Float[Array, "T K H"], Float[Array, "T K H"]]
"""Of keys and of values: what comes back from compression, less what went in."""


ManyErrors = tuple[Float[Array, "P T K H"], Float[Array, "P T K H"]]
"""P of them."""


@register_dataclass
@dataclass(frozen=True)
class Seen:
    """Queries, keys and values of a layer, float32, the keys as they are compressed: centred."""

    q: Float[Array, "T N H"]
    k: Float[Array, "T K H"]
    v: Float[Array, "T K H"]


def read(
    model: Llama,
    tokens: Int[Array, " T"],
    config: CacheConfig,
    errors: Callable[[int, Seen], Errors] | None = None,
    start: int = 0,
) -> Iterator[tuple[Seen, Float[Array, "1 T D"]]]:
    """From the first layer to the last: what it saw, and what leaves it.

    With `errors` every query finds the tokens that a cache of this config would hold compressed
    when it decodes off by so much: teacher forcing, as `attention.teacher_forcing` has it.
    """
    hidden, angles = _embed(model, tokens, start)
    for index, layer in enumerate(_layers(model)):
        seen = _see(layer, hidden, angles, config)
        off = None if errors is None else errors(index, seen)
        hidden = _forward(layer, hidden, angles, off, config)
        yield seen, hidden


def final(model: Llama, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Behind the last norm, as `Llama` returns it."""
    return rms_norm(hidden, model.norm[...], model.config.rms_norm_eps)


def look_back(
    model: Llama, tokens: Int[Array, " T"], config: CacheConfig, key: Key[Array, ""], start: int = 0
) -> Iterator[tuple[int, Seen, Errors]]:
    """From the last layer to the first: its number, what it saw, and the gradients g of keys and
    values; `key` draws the text.

    The first token has the position `start`: attention does not change with it, but keys and
    queries are turned to where those of a long text are. What enters each layer is kept: layers x T
    x D numbers.
    """
    layers = _layers(model)
    hidden, angles = _embed(model, tokens, start)
    entering = [hidden, *(after for _, after in read(model, tokens, config, start=start))]
    back = _likelihood(model, entering.pop(), key)
    for index in reversed(range(len(layers))):
        hidden = entering.pop()
        back, gradients = _backward(layers[index], hidden, angles, back, config)
        yield index, _see(layers[index], hidden, angles, config), gradients


def alone(
    model: Llama, tokens: Int[Array, " T"], config: CacheConfig, start: int = 0
) -> Iterator[tuple[int, Seen, Callable[[ManyErrors], Float[np.ndarray, " P"]]]]:
    """Every layer's number, what it saw, and what errors of its keys and values alone would lose.

    That is the KL divergence in nats a token for each of P errors, of passes from this layer on:
    the mean over predictions that find tokens compressed, `ASKED` of them spread evenly. Tokens
    before the first of these are what they are in full precision: passes begin behind them.
    """
    layers, first = _layers(model), first_prediction(config, tokens.shape[0])
    asked = np.unique(np.linspace(first, len(tokens) - 2, ASKED).astype(int))
    exactly = partial(jax.default_matmul_precision, "highest")  # other products round as much
    with exactly():
        hidden, angles = _embed(model, tokens, start)
        entering = [hidden, *(after for _, after in read(model, tokens, config, start=start))]
        expected = _log_probabilities(model, entering.pop()[0, asked])
        late, early = ([x[:, part] for x in angles] for part in (slice(first, None), slice(first)))
        before = [
            _before(layer, hidden[:, :first], early)
            for layer, hidden in zip(layers, entering, strict=True)
        ]

    def lose(index: int, off: ManyErrors) -> Float[np.ndarray, " P"]:
        with exactly():
            hidden = entering[index][:, first:]
            found = _first(layers[index], hidden, late, off, config, before[index])
            for layer, known in zip(layers[index + 1 :], before[index + 1 :], strict=True):
                found = _next(layer, found, late, config, known)
            return np.asarray(_kl(model, expected, found[:, 0, asked - first]), np.float64)

    for index, hidden in enumerate(entering):
        yield index, _see(layers[index], hidden, angles, config), partial(lose, index)


def first_prediction(config: CacheConfig, count: int) -> int:
    """Of a text of so many tokens the first position whose query finds tokens compressed.

    Raises:
      ValueError: a text of which no query with a prediction does.
    """
    compressed = np.asarray(edge(config, np.arange(count - 1))) > config.sinks
    if not compressed.any():
        raise ValueError(f"text: got {count} tokens, expected so many that some are compressed")
    return int(np.argmax(compressed))


def _layers(model: Llama) -> list[Layer]:
    return list((unstack(model) if isinstance(model.layers, Layer) else model).layers)


def _embed(model, tokens, start: int):
    positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)[None, :]
    return model.embedding[...][tokens][None], rotation_angles(model.config, positions)


@partial(compiled, static_argnames="config")
def _see(layer, hidden, angles, config):
    def attend(state, index, projection):
        q, k, v = projection.heads()
        return jnp.zeros_like(q), (q[0], k[0], v[0])

    _, (q, k, v) = layer(hidden, *angles, jnp.int32(0), (), attend)
    k, v = k.astype(config.dtype), v.astype(config.dtype)
    if config.center_keys:
        phases = pre_rope.create(config, k.shape[0])
        mean = pre_rope.mean_key(k[config.sinks : config.sinks + config.block], phases)
        k = pre_rope.center(k, mean, phases, jnp.arange(k.shape[0], dtype=jnp.int32) - config.sinks)
    return Seen(*(x.astype(jnp.float32) for x in (q, k, v)))


@compiled
def _before(layer, hidden, angles):
    """Keys and values of tokens, float32."""

    def attend(state, index, projection):
        q, k, v = projection.heads()
        return jnp.zeros_like(q), tuple(x[0].astype(jnp.float32) for x in (k, v))

    return layer(hidden, *angles, jnp.int32(0), (), attend)[1]


def _pass(layer, hidden, angles, off, config, before=None):
    """Of all tokens, or of those behind others with the keys and values `before`."""

    def attend(state, index, projection):
        return _attend(projection, off, config, before), state

    return layer(hidden, *angles, jnp.int32(0), (), attend)[0]


_forward = compiled(_pass, static_argnames="config")


@partial(compiled, static_argnames="config")
def _first(layer, hidden, angles, off: ManyErrors, config, before):
    return lax.map(lambda own: _pass(layer, hidden, angles, own, config, before), off)


@partial(compiled, static_argnames="config")
def _next(layer, hidden, angles, config, before):
    return lax.map(lambda own: _pass(layer, own, angles, None, config, before), hidden)


def _predict(model, hidden):
    def at(own):
        return jax.nn.log_softmax(model.logits(final(model, own[None, None]))[0, 0])

    return lax.map(at, hidden, batch_size=_ROWS)


_log_probabilities = compiled(_predict)


@compiled
def _kl(model, expected, hidden):
    """Of P texts, the mean over these predictions."""

    def of_text(own):
        found = _predict(model, own)
        return jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=1))

    return lax.map(of_text, hidden)


def _attend(projection, off: Errors | None, config: CacheConfig, before=None):
    """Causal attention of one sequence; what is compressed is off by so much."""
    q, k, v = (x[0].astype(jnp.float32) for x in projection.heads())
    if before is not None:
        k, v = (jnp.concatenate(pair) for pair in zip(before, (k, v), strict=True))
    (count, heads, dim), window = k.shape, projection.sliding_window
    position = jnp.arange(count, dtype=jnp.int32)
    query = position[count - q.shape[0] :]
    distance = query[:, None] - position[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    end = edge(config, query)[:, None]
    held = (position[None, :] >= config.sinks) & (position[None, :] < end)
    grouped = q.reshape(len(q), heads, -1, dim)
    products = jnp.einsum("tkgh,skh->kgts", grouped, k)
    if off is not None:
        products += jnp.where(held, jnp.einsum("tkgh,skh->kgts", grouped, off[0]), 0.0)
    weights = jax.nn.softmax(
        jnp.where(seen, projection.scores.of(products, dim), -jnp.inf), axis=-1
    )
    out = jnp.einsum("kgts,skh->tkgh", weights, v)
    if off is not None:
        out += jnp.einsum("kgts,skh->tkgh", jnp.where(held, weights, 0.0), off[1])
    return out.reshape(1, *q.shape)


@compiled
def _likelihood(model, hidden, key):
    """The gradient by `hidden` of sum_t log p(y_t), y_t drawn from p."""

    normed, pull = jax.vjp(partial(final, model), hidden)
    count = hidden.shape[1]
    rows = min(_ROWS, count)
    padded = jnp.pad(normed[0], ((0, -count % rows), (0, 0))).reshape(-1, rows, hidden.shape[2])

    def of_rows(xs):
        own, x = xs
        logits, pull = jax.vjp(lambda x: model.logits(x[None])[0], x)
        drawn = jax.nn.one_hot(jax.random.categorical(own, logits), logits.shape[1])
        return pull(drawn - jax.nn.softmax(logits))[0]

    back = lax.map(of_rows, (jax.random.split(key, padded.shape[0]), padded))
    return pull(back.reshape(1, -1, hidden.shape[2])[:, :count].astype(normed.dtype))[0]


@partial(compiled, static_argnames="config")
def _backward(layer, hidden, angles, back, config):
    """The gradient by what enters the layer, and by errors of its keys and values."""

    def run(hidden, off):
        return _pass(layer, hidden, angles, off, config)

    nothing = jnp.zeros((hidden.shape[1], layer.config.num_kv_heads, layer.config.head_dim))
    return jax.vjp(run, hidden, (nothing, nothing))[1](back)
