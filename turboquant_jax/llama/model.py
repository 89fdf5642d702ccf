"""The Llama decoder in `flax.nnx`, used functionally: parameters inside, everything else passed.

The decoder knows nothing of any cache. It hands the rotated queries, keys and values of a layer
to an `attend` callable together with an opaque state, so that one model serves full-precision,
compressed and teacher-forced evaluation.
"""

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

from turboquant_jax.llama.config import LlamaConfig
from turboquant_jax.llama.rope import apply_rope, rotation_angles

State = TypeVar("State")

Attend = Callable[
    [
        State,
        Int[Array, ""],  # index of the layer: a tracer under `lax.scan`, else a number
        Float[Array, "B T N H"],  # queries, after RoPE
        Float[Array, "B T K H"],  # keys, after RoPE
        Float[Array, "B T K H"],  # values
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


def project(equation: str, x: Array, weight: Array) -> Array:
    """`einsum` of two operands, accumulated in float32 and cast back to x's dtype."""
    return jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


class Layer(nnx.Module):
    """One decoder layer. `Llama` holds a single one whose parameters carry a leading layer axis."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((dim,), dtype))
        self.q = nnx.Param(_normal(rngs, (dim, heads, head_dim), dim, dtype))
        self.k = nnx.Param(_normal(rngs, (dim, kv_heads, head_dim), dim, dtype))
        self.v = nnx.Param(_normal(rngs, (dim, kv_heads, head_dim), dim, dtype))
        self.o = nnx.Param(_normal(rngs, (heads, head_dim, dim), heads * head_dim, dtype))
        self.ffn_norm = nnx.Param(jnp.ones((dim,), dtype))
        self.gate = nnx.Param(_normal(rngs, (dim, ffn), dim, dtype))
        self.up = nnx.Param(_normal(rngs, (dim, ffn), dim, dtype))
        self.down = nnx.Param(_normal(rngs, (ffn, dim), ffn, dtype))

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        cos: Float[Array, "B T H/2"],
        sin: Float[Array, "B T H/2"],
        index: Int[Array, ""],
        state: State,
        attend: Attend[State],
    ) -> tuple[Float[Array, "B T D"], State]:
        """Attention and the gated feed-forward network, each added to the residual stream."""
        epsilon = self.config.rms_norm_eps
        x = rms_norm(hidden, self.attention_norm[...], epsilon)
        q = apply_rope(project("BTD,DNH->BTNH", x, self.q[...]), cos, sin)
        k = apply_rope(project("BTD,DKH->BTKH", x, self.k[...]), cos, sin)
        v = project("BTD,DKH->BTKH", x, self.v[...])
        out, state = attend(state, index, q, k, v)
        hidden = hidden + project("BTNH,NHD->BTD", out.astype(hidden.dtype), self.o[...])
        x = rms_norm(hidden, self.ffn_norm[...], epsilon)
        gate = jax.nn.silu(project("BTD,DF->BTF", x, self.gate[...]))
        inner = gate * project("BTD,DF->BTF", x, self.up[...])
        return hidden + project("BTF,FD->BTD", inner, self.down[...]), state


class Llama(nnx.Module):
    """The decoder: embedding, layers stacked on a leading axis, final norm, vocabulary matrix.

    Being a pytree of its parameters, it is passed to `jax.jit` as an argument like any array.
    `Llama(config, rngs, dtype)` draws random weights, of variance 1 / fan-in so that activations
    stay of order one; `nnx.eval_shape` and `jax.jit` serve the constructor at any size.
    The dtype of the parameters is the dtype of the computation; sums accumulate in float32.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: DTypeLike = jnp.bfloat16):
        dim, vocab = config.hidden_size, config.vocab_size
        self.config = config
        self.embedding = nnx.Param(_normal(rngs, (vocab, dim), dim, dtype))
        # one after another: the random bits of a layer take four times its weights
        self.layers = lax.map(
            lambda key: Layer(config, nnx.Rngs(key), dtype),
            jax.random.split(rngs.params(), config.num_layers),
        )
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
        layer index it is given.
        """
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
        return jnp.einsum("BTD,VD->BTV", hidden, matrix[...], preferred_element_type=jnp.float32)


def unstack(model: Llama, *, donate: bool = False) -> Llama:
    """The same decoder with an array per layer, traced one after another instead of scanned.

    For decoding: a step of `lax.scan` copies its layer out of the stack before it reads it, which
    is three times the traffic where reading the weights is all there is to do. The price is
    compilation in proportion to the layers. `donate` gives up the stacked arrays one by one, so
    that beside the weights never more than one of them is in memory; `model` is useless then.
    """
    leaves, structure = jax.tree.flatten(model.layers)
    by_layer = []
    for leaf in leaves:
        by_layer.append(jax.block_until_ready(_rows(leaf)))
        if donate:
            leaf.delete()
    layers = [jax.tree.unflatten(structure, arrays) for arrays in zip(*by_layer, strict=True)]
    unstacked = jax.tree.map(lambda x: x, model)
    unstacked.layers = nnx.List(layers)
    return unstacked


@jax.jit
def _rows(stack: Array) -> tuple[Array, ...]:
    return tuple(stack)


def random_model(config: LlamaConfig, seed: int, dtype: DTypeLike = jnp.bfloat16) -> Llama:
    """A stacked decoder of random weights, drawn on the device in little more than their memory."""
    make = jax.jit(lambda key: Llama(config, nnx.Rngs(key), dtype))
    return make(jax.random.key(seed))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """In blocks of rows, because the random bits of a vocabulary matrix take gigabytes."""
    scale = jnp.asarray(fan_in**-0.5, dtype)
    rows = math.gcd(shape[0], 4096)
    keys = jax.random.split(rngs.params(), shape[0] // rows)
    blocks = lax.map(lambda key: jax.random.normal(key, (rows, *shape[1:]), dtype) * scale, keys)
    return blocks.reshape(shape)
