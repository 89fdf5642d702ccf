"""The decoder in `flax.nnx`, used functionally: parameters inside, everything else passed.

The decoder knows nothing of any cache. It hands what a layer projects to an `attend` callable
together with an opaque state, so that one model serves full-precision, compressed and
teacher-forced evaluation.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from turboquant_jax.attention.projection import Projection
from turboquant_jax.attention.segments import Scores
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.rope import rotation_angles
from turboquant_jax.models.token_ids import require_token_ids

State = TypeVar("State")

Attend = Callable[
    [
        State,
        Int[Array, ""],  # index of the layer: a tracer under `lax.scan`, else a number
        Projection,  # of the new tokens
    ],
    tuple[Float[Array, "B T N H"], State],
]
"""Attention of one layer over whatever `State`, any pytree, holds: outputs and the new state."""


def rms_norm(
    x: Float[Array, "B T D"], weight: Float[Array, "D"], epsilon: float
) -> Float[Array, "B T D"]:
    """`x / sqrt(mean(x**2) + epsilon) * weight`, computed in float32 and cast back to x's dtype."""
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * weight.astype(jnp.float32)[None, None, :]).astype(x.dtype)


def norm_heads(
    qkv: Float[Array, "B T K group H"], weights: Float[Array, "2 H"], epsilon: float
) -> Float[Array, "B T K group H"]:
    """`rms_norm` of every query with the first weight and of every key with the second."""
    of_query, of_key = weights.astype(jnp.float32)
    queries = jnp.broadcast_to(of_query[None], (qkv.shape[3] - 2, of_query.shape[0]))
    weight = jnp.concatenate([queries, of_key[None]])[None, None, None]
    wide = qkv[..., :-1, :].astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    normed = (wide * inverse * weight).astype(qkv.dtype)
    return jnp.concatenate([normed, qkv[..., -1:, :]], axis=-2)


def project(equation: str, x: Array, weight: Array, bias: nnx.Param | None = None) -> Array:
    """`einsum` of two operands in x's dtype, accumulated in float32 by XLA, plus a bias.

    Not asked for in float32: the vendor's products would write that, and XLA convert it apart.
    The bias [...] has the last axes of the product.
    """
    product = jnp.einsum(equation, x, weight)
    return product if bias is None else product + bias[...][None, None]


class Layer(nnx.Module):
    """One decoder layer. `Llama` holds a list, or a single one with a leading layer axis.

    Matrices that read the same vectors are one, because a step of decoding, which only reads
    weights, reads a large one faster. Of `qkv` a kv head has G queries, then its key and its value.
    Biases and norms that the architecture lacks are None.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((dim,), dtype))
        group = heads // kv_heads + 2
        self.qkv = nnx.Param(_normal(rngs, (dim, kv_heads, group, head_dim), dim, dtype))
        self.o = nnx.Param(_normal(rngs, (heads, head_dim, dim), heads * head_dim, dtype))
        self.ffn_norm = nnx.Param(jnp.ones((dim,), dtype))
        self.gate_up = nnx.Param(_normal(rngs, (dim, 2, ffn), dim, dtype))
        self.down = nnx.Param(_normal(rngs, (ffn, dim), ffn, dtype))

        def optional(there: bool, fill: Callable, *shape: int) -> nnx.Param | None:
            return nnx.Param(fill(shape, dtype)) if there else None

        self.qkv_bias = optional(config.qkv_bias, jnp.zeros, kv_heads, group, head_dim)
        self.qk_norm = optional(config.qk_norm, jnp.ones, 2, head_dim)
        self.o_bias = optional(config.o_bias, jnp.zeros, dim)
        self.gate_up_bias = optional(config.mlp_bias, jnp.zeros, 2, ffn)
        self.down_bias = optional(config.mlp_bias, jnp.zeros, dim)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
        index: Int[Array, ""],
        state: State,
        attend: Attend[State],
    ) -> tuple[Float[Array, "B T D"], State]:
        """Attention and the gated feed-forward network, each added to the residual stream."""
        config, epsilon = self.config, self.config.rms_norm_eps
        x = rms_norm(hidden, self.attention_norm[...], epsilon)
        qkv = project("BTD,DKGH->BTKGH", x, self.qkv[...], self.qkv_bias)
        if self.qk_norm is not None:
            qkv = norm_heads(qkv, self.qk_norm[...], epsilon)
        scores = Scores(config.attention_scale, config.attention_softcap)
        projection = Projection(qkv, cos, sin, scores, config.sliding_window)
        out, state = attend(state, index, projection)
        out = out.astype(hidden.dtype)
        hidden = hidden + project("BTNH,NHD->BTD", out, self.o[...], self.o_bias)
        x = rms_norm(hidden, self.ffn_norm[...], epsilon)
        gate_up = project("BTD,DCF->BTCF", x, self.gate_up[...], self.gate_up_bias)
        inner = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return hidden + project("BTF,FD->BTD", inner, self.down[...], self.down_bias), state


class Llama(nnx.Module):
    """The decoder: embedding, layers, final norm, vocabulary matrix.

    Being a pytree of its parameters, it is passed to `jax.jit` as an argument like any array.
    `Llama(config, rngs, dtype)` draws random weights, of variance 1 / fan-in so that activations
    stay of order one; `nnx.eval_shape` and `jax.jit` serve the constructor at any size.
    The dtype of the parameters is the dtype of the computation; sums accumulate in float32.

    The layers are `stacked` on a leading axis and scanned, which compiles quickly, or a list and
    traced one after another, which decodes quickly: a step of `lax.scan` copies its layer out of
    the stack before it reads it, three times the traffic where reading the weights is all there
    is to do.
    """

    def __init__(
        self,
        config: LlamaConfig,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        stacked: bool = True,
    ):
        dim, vocab = config.hidden_size, config.vocab_size
        self.config = config
        self.embedding = nnx.Param(_normal(rngs, (vocab, dim), dim, dtype))
        # one after another: the random bits of a layer take four times its weights
        keys = jax.random.split(rngs.params(), config.num_layers)
        draw = jax.jit(lambda key: Layer(config, nnx.Rngs(key), dtype))
        self.layers = lax.map(draw, keys) if stacked else nnx.List(map(draw, keys))
        self.norm = nnx.Param(jnp.ones((dim,), dtype))
        tied = config.tie_embeddings
        self.head = None if tied else nnx.Param(_normal(rngs, (vocab, dim), dim, dtype))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: State,
        attend: Attend[State],
    ) -> tuple[Float[Array, "B T D"], State]:
        """Hidden vectors after the final norm, and the state as the last layer left it.

        `positions` counts tokens from the start of each sequence. `attend` is traced once for
        all layers under `lax.scan`, and once a layer where they are unstacked: it must use the
        layer index it is given. Raises ValueError for an id that the embedding has no row for,
        where the values are at hand: not under `jax.jit`.
        """
        require_token_ids(tokens, self.config.vocab_size)
        cos, sin = rotation_angles(self.config, positions)

        def step(carry, layer_and_index):
            hidden, state = carry
            layer, index = layer_and_index
            return layer(hidden, cos, sin, index, state, attend), None

        hidden = self.embedding[...][tokens]
        if isinstance(self.layers, Layer):
            indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
            (hidden, state), _ = lax.scan(step, (hidden, state), (self.layers, indices))
        else:
            for index, layer in enumerate(self.layers):
                (hidden, state), _ = step((hidden, state), (layer, np.int32(index)))
        return rms_norm(hidden, self.norm[...], self.config.rms_norm_eps), state

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits; apart from `__call__`, so that only the rows needed pay for them."""
        matrix = self.embedding if self.head is None else self.head
        plain = jnp.einsum("BTD,VD->BTV", hidden, matrix[...], preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return plain if cap is None else cap * jnp.tanh(plain / cap)


def unstack(model: Llama) -> Llama:
    """The same decoder with an array per layer, copied out of the stack."""
    layers = [
        jax.tree.map(lambda x, i=i: x[i], model.layers) for i in range(model.config.num_layers)
    ]
    unstacked = jax.tree.map(lambda x: x, model)
    unstacked.layers = nnx.List(layers)
    return unstacked


def random_model(
    config: LlamaConfig, seed: int, dtype: DTypeLike = jnp.bfloat16, *, stacked: bool = True
) -> Llama:
    """A decoder of random weights, drawn on the device in little more than their memory."""
    key = jax.random.key(seed)
    if not stacked:  # layer by layer: all in one program would take long to compile
        return Llama(config, nnx.Rngs(key), dtype, stacked=False)
    return jax.jit(lambda key: Llama(config, nnx.Rngs(key), dtype))(key)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """Normal weights that keep the scale of what they multiply."""
    return _draw(rngs.params(), shape, fan_in**-0.5, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, shape: tuple[int, ...], scale: float, dtype: DTypeLike) -> Array:
    """In blocks of rows, because the random bits of a vocabulary matrix take gigabytes.

    Compiled as a whole, or the reshape would leave a hole of the matrix's size in the memory.
    """
    rows = math.gcd(shape[0], 4096)
    keys = jax.random.split(key, shape[0] // rows)
    factor = jnp.asarray(scale, dtype)
    blocks = lax.map(lambda key: jax.random.normal(key, (rows, *shape[1:]), dtype) * factor, keys)
    return blocks.reshape(shape)
