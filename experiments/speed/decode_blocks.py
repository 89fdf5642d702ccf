"""Random compressed blocks in an 8B model's shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.common import CHANNELS, KV_HEADS, cache_config
from pallas_kernels.decode_attention import (
    BlocksOperand,
    ExactOperand,
    ExactPlaces,
    PagedBlocks,
    PhasesOperand,
    Schedule,
    Softmax,
    decode_attention,
)
from pallas_kernels.primitives.codebook import CodebookOperand, CodeKind, level_limits
from turboquant_jax.cache import kernel_operands, pre_rope

PAGE = 64
SM_SCALE = CHANNELS**-0.5
Pair = tuple[int, int]
STEP = 0.04


def codebook(bits: int, code: CodeKind = "scalar") -> CodebookOperand:
    """Evenly spread levels with a dent, so that no shortcut for uniform levels is right."""
    low, high = level_limits(bits, code)
    position = np.linspace(-1.0, 1.0, 2 ** (bits + (code == "trellis")))
    levels = np.round((0.7 * position + 0.3 * position**3) * min(-low, high)).astype(int)
    return CodebookOperand(bits, tuple(int(x) for x in levels), STEP, code)


def random_blocks(
    key: jax.Array, bits: Pair, pages: int, tokens: int = PAGE, code: CodeKind = "scalar"
) -> BlocksOperand:
    """Random codes and scales near 1: any byte is valid."""
    keys, books = jax.random.split(key, 8), [codebook(b, code) for b in bits]
    rows = [(tokens, CHANNELS), (CHANNELS, tokens)]
    planes = [
        tuple(
            jax.random.bits(keys[4 * side + i], (KV_HEADS, pages, r, n * w // 8), jnp.uint8)
            for i, w in enumerate(books[side].widths)
        )
        for side, (r, n) in enumerate(rows)
    ]
    scale = jax.random.uniform(keys[3], (2, KV_HEADS, pages, tokens), minval=0.5, maxval=1.5)
    words = jax.lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    return BlocksOperand(
        keys=(planes[0],),
        values=(planes[1],),
        scales=(words[0] << 16 | words[1],),
        key_codebooks=(books[0],),
        value_codebooks=(books[1],),
    )


def int8_xla(q: jax.Array, k: jax.Array, v: jax.Array, scales: jax.Array) -> jax.Array:
    """An int8 cache [B, K, S, H] with float32 scales [2, B, K, S], left to XLA."""
    split = q.reshape(q.shape[0], KV_HEADS, -1, CHANNELS)
    score = jnp.einsum("bkgh,bksh->bkgs", split, k.astype(jnp.bfloat16)).astype(jnp.float32)
    share = jax.nn.softmax(score * scales[0][:, :, None, :] * SM_SCALE, axis=-1)
    share = (share * scales[1][:, :, None, :]).astype(jnp.bfloat16)
    return jnp.einsum("bkgs,bksh->bkgh", share, v.astype(jnp.bfloat16)).reshape(q.shape)


def means(kind: str, batch: int, tokens: int) -> tuple[jax.Array | None, PhasesOperand | None]:
    """Mean keys and phases for the kernel: of `kind` "" none, "stored" or "pre_rope"."""
    if not kind:
        return None, None
    mean = 3.0 * jax.random.normal(jax.random.key(1), (batch, KV_HEADS, CHANNELS), jnp.float32)
    phases = pre_rope.create(cache_config(1, 4, kind), tokens) if kind == "pre_rope" else None
    return mean, None if phases is None else kernel_operands.of_phases(phases)


def _places(newest: int, length, pending) -> ExactPlaces:
    del pending
    return ExactPlaces((0, length), ((0, newest, 0),))


@partial(jax.jit, static_argnums=(4, 5))  # traced once for the calls of a chain
def attend_with_newest(
    q: jax.Array,
    held: PagedBlocks,
    mean: jax.Array | None,
    phases: PhasesOperand | None,
    schedule: Schedule | None = None,
    tokens: int = 1,
) -> jax.Array:
    """The kernel over blocks and the newest tokens in full precision, on which a mean rides.

    The query heads of a kv head are those of so many `tokens`, one after the other.
    """
    batch = q.shape[0]
    newest = jnp.zeros((batch, tokens, KV_HEADS, CHANNELS), jnp.bfloat16)
    exact = ExactOperand(
        query=q,
        keys=(newest,),
        values=(newest,),
        pending=jnp.zeros((batch,), jnp.int32),
        places=partial(_places, tokens),
        key_mean=mean,
        phases=phases,
        queries=tokens,
    )
    softmax = Softmax(SM_SCALE)
    return decode_attention(q, held, softmax, exact=exact, dtype=q.dtype, schedule=schedule)[0]
