"""Full precision without any structure: the past as dense arrays, and the vendor's attention.

The baseline that compression has to beat. `attention` keeps its own full precision, a window that
never lets go, for comparing numbers; this is for comparing time and memory.
"""

import functools
import operator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.attention.projection import Projection
from turboquant_jax.attention.segments import attend_segment
from turboquant_jax.cache.mesh import CONTEXT, DATA, SEQUENCES, TOKENS
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.generate import Past


@register_dataclass
@dataclass(frozen=True)
class Dense:
    """Keys (after RoPE) and values of B sequences with room for S tokens each.

    An array per layer, because cuDNN reads whole buffers: of a stack over the layers every step
    would copy every layer. So the decoder must be unstacked.

    Attributes:
      keys, values: one array a layer.
      lengths: int32 [B], tokens of each sequence.
      pending: int32 [B], tokens being appended.
      overflow: True once an append did not fit; that append left the sequence as it was.
    """

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    lengths: Int[Array, " B"]
    pending: Int[Array, " B"]
    overflow: Bool[Array, " B"]

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of every array."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def with_lengths(self, lengths: Int[Array, " B"]) -> "Dense":
        """As if every sequence had so many tokens."""
        return replace(self, lengths=lengths)


def create(
    config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.bfloat16
) -> Dense:
    """An empty past; ValueError for a batch or a capacity below 1."""
    if batch < 1 or capacity < 1:
        raise ValueError(f"batch and capacity must be positive, got {batch} and {capacity}")
    shape = (batch, capacity, config.num_kv_heads, config.head_dim)

    def zeros():
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    none = jnp.zeros(batch, jnp.int32)
    return Dense(zeros(), zeros(), none, jnp.copy(none), jnp.zeros(batch, bool))


def begin(state: Dense, counts: Int[Array, " B"], most: int) -> Dense:
    """Announce `counts` tokens; of a sequence that they do not fit none are written."""
    fits = (state.lengths + counts <= state.keys[0].shape[1]) & ~state.overflow
    return replace(state, pending=jnp.where(fits, counts, 0), overflow=state.overflow | ~fits)


def attend(
    state: Dense,
    layer: Int[Array, ""] | int,
    projection: Projection,
) -> tuple[Float[Array, "B T N H"], Dense]:
    """Write the pending tokens of a layer, then attend to all up to and with each query.

    By cuDNN's flash attention on a GPU, in the dtype of the state; by `attend_segment` elsewhere,
    and for a soft cap. All tokens are kept, also those behind a sliding window.

    Raises:
      ValueError: a layer whose number is not known to the compiler, as under `lax.scan`.
    """
    try:
        index = operator.index(layer)
    except TypeError as error:
        raise ValueError("got a stacked decoder, expected stacked=False") from error
    q, k, v = projection.heads()
    slots, written = state.keys[index].shape[1], []
    token = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    position = state.lengths[:, None] + token
    place = jnp.where(token < state.pending[:, None], position, slots)  # past the end: dropped
    row = jnp.broadcast_to(jnp.arange(place.shape[0])[:, None], place.shape)
    for old, new in ((state.keys, k), (state.values, v)):
        array = old[index].at[row, place].set(new.astype(old[index].dtype), mode="drop")
        written.append((*old[:index], array, *old[index + 1 :]))
    state = replace(state, keys=written[0], values=written[1])
    out = _attention(projection, q, state.keys[index], state.values[index], position)
    return out.astype(q.dtype), state


def commit(state: Dense, accepted: Int[Array, " B"] | None = None) -> Dense:
    """Count the pending tokens, which every layer has now written; of each row the first ones."""
    kept = state.pending if accepted is None else jnp.minimum(accepted, state.pending)
    lengths = state.lengths + kept
    return replace(state, lengths=lengths, pending=jnp.zeros_like(state.pending))


def room(state: Dense) -> Int[Array, " B"]:
    """Tokens that still fit: whatever they are, they see the same of the past."""
    return state.capacity - state.lengths


DENSE = Past(begin, attend, commit, begin, room)
"""For a decoder that is unstacked; look at `overflow` afterwards."""


def specs(state: Dense) -> Dense:
    """The partition spec of every array, as a pytree like it: heads and sequences are split."""
    return jax.tree.map(lambda leaf: TOKENS if leaf.ndim == 4 else SEQUENCES, state)


@functools.cache
def on_mesh(mesh: Mesh) -> Past[Dense]:
    """`DENSE` on several devices, each with its sequences and its kv heads.

    Raises:
      ValueError: a context that is split.
    """
    if mesh.shape[CONTEXT] > 1:
        raise ValueError(
            f"context: got {mesh.shape[CONTEXT]} shares of a past in full precision, expected 1"
        )

    def attend_heads(
        state: Dense, layer: Int[Array, ""] | int, projection: Projection
    ) -> tuple[Float[Array, "B T N H"], Dense]:
        index = operator.index(layer)
        own = replace(state, keys=(state.keys[index],), values=(state.values[index],))
        given = jax.tree.unflatten(jax.tree.structure(projection), [TOKENS, P(DATA), P(DATA)])
        run = jax.shard_map(
            lambda own, projection: attend(own, 0, projection),
            mesh=mesh, in_specs=(specs(own), given), out_specs=(TOKENS, specs(own)),
            check_vma=False,
        )  # fmt: skip
        output, own = run(own, projection)
        keys, values = (
            (*old[:index], new, *old[index + 1 :])
            for old, (new,) in ((state.keys, own.keys), (state.values, own.values))
        )
        return output, replace(state, keys=keys, values=values)

    return Past(begin, attend_heads, commit, begin, room)


def _attention(
    projection: Projection,
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    position: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    slot = jnp.arange(keys.shape[1], dtype=jnp.int32)
    scores, window = projection.scores, projection.sliding_window
    distance = position[:, :, None] - slot[None, None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if jax.default_backend() != "gpu" or scores.softcap is not None:
        return attend_segment(q, keys, values, seen, scores)[0]
    cudnn = functools.partial(
        jax.nn.dot_product_attention, q.astype(keys.dtype), keys, values,
        scale=scores.scale, implementation="cudnn",
    )  # fmt: skip
    if q.shape[1] == 1 and window is None:
        return cudnn(key_value_seq_lengths=position[:, 0] + 1)
    # cuDNN aligns causal masks and windows with the first key, not with the end of the past: a
    # mask then
    return cudnn(mask=seen[:, None])
