"""Query tokens that attend in one call of the decode kernel, as heads of one."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.primitives.limits import MAX_HEADS, MAX_TURNED_HEADS
from turboquant_jax.cache.state import Cache


@dataclass(frozen=True)
class Together:
    """Query tokens whose heads are heads of one to the kernel: `most` of the `count` in a call."""

    kv_heads: int
    count: int
    most: int

    @staticmethod
    def of(cache: Cache, q: Float[Array, "B T N H"]) -> "Together":
        """As many calls as its columns make necessary, of about as many tokens each."""
        columns = MAX_HEADS if cache.phases is None else MAX_TURNED_HEADS
        count, group = q.shape[1], q.shape[2] // cache.kv_heads
        calls = -(-count // max(1, columns // group))
        return Together(cache.kv_heads, count, -(-count // calls))

    def calls(self) -> list[range]:
        """The tokens of each call."""
        starts = range(0, self.count, self.most)
        return [range(start, min(start + self.most, self.count)) for start in starts]

    def heads(self, x: Float[Array, "B T N H"], tokens: range) -> Float[Array, "B _ H"]:
        """Of a kv head those of the first token, then those of the next ones."""
        some = x[:, tokens.start : tokens.stop]
        by_head = some.reshape(x.shape[0], len(tokens), self.kv_heads, -1, x.shape[3])
        return jnp.moveaxis(by_head, 1, 2).reshape(x.shape[0], -1, x.shape[3])

    def tokens(self, x: Float[Array, "B *_"], tokens: range) -> Float[Array, "B T *_"]:
        """The inverse, of outputs or of their log-sum-exp."""
        by_head = x.reshape(x.shape[0], self.kv_heads, len(tokens), -1, *x.shape[2:])
        return jnp.moveaxis(by_head, 2, 1).reshape(x.shape[0], len(tokens), -1, *x.shape[2:])
