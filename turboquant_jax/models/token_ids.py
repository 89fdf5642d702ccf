"""Token ids that have no row in the embedding, for which JAX would silently take another row."""

import jax
import numpy as np
from jaxtyping import Array, Int


def require_token_ids(
    tokens: Int[Array, "B T"], vocab_size: int, lengths: Int[Array, "B"] | None = None
) -> None:
    """ValueError for the first id outside of 0 to vocab_size - 1; row b has `lengths[b]` tokens.

    Values that this process does not have are not looked at: under `jax.jit`, on other hosts.
    """
    if not (_is_here(tokens) and _is_here(lengths)):
        return
    ids = np.asarray(tokens)
    wrong = (ids < 0) | (ids >= vocab_size)
    if lengths is not None:
        wrong &= np.arange(ids.shape[1])[None, :] < np.asarray(lengths)[:, None]
    if wrong.any():
        row, place = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"token {place} of row {row}: got id {ids[row, place]}, "
            f"expected 0 to {vocab_size - 1}, the rows of the embedding"
        )


def _is_here(array: Array | None) -> bool:
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
