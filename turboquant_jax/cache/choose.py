"""What runs a call: the one place where a cache and a call are held against what serves them.

Chosen once, by the function that was called, and handed down: what "xla" was asked for contains no
kernel, however deep. Reasons are sentences, so that a refusal can say them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.primitives.limits import MAX_FORMATS, MAX_QUERIES, PAGE_TOKENS
from turboquant_jax.cache import kernel_operands
from turboquant_jax.cache.state import Cache
from turboquant_jax.implementation import Implementation, no_gpu, resolve

JOINT = "calibrated channels with one scale for all groups"
SKETCHED = "keys of the code prod, with a sketch of what their codes leave"


@dataclass(frozen=True)
class Compression:
    """What compresses: `blocks`, from vectors to pages; where that is XLA, `search`, for paths."""

    blocks: Implementation
    search: Implementation


@dataclass(frozen=True)
class Attention:
    """What attends, what decodes the `pages` that prefill reads, and what compresses.

    `shared`: so many blocks of the sequences are those of the first one, and read once for all.
    `empty`: the cache holds nothing, and no program is made for what it could hold.
    """

    attend: Implementation
    pages: Implementation
    compression: Compression
    shared: int = 0
    empty: bool = False


def choose_compression(cache: Cache, implementation: Implementation | None) -> Compression:
    """For `write` and `commit`.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: one that this device or cache is not served by.
    """
    blocks = resolve(implementation, {"pallas": _compression(cache), "xla": None})
    search = resolve("xla" if implementation == "xla" else None, {"pallas": no_gpu(), "xla": None})
    return Compression(blocks, search)


def choose_attention(
    cache: Cache,
    queries: int,
    softcap: float | None,
    implementation: Implementation | None,
    shared: int = 0,
) -> Attention:
    """For attention of so many query tokens a sequence, and what it writes.

    Raises:
      ValueError: an unknown implementation, or shared blocks that the cache cannot have.
      NotImplementedError: one that this device, cache or call is not served by.
    """
    most = 0 if cache.config.sliding_window is not None else cache.layout.slots
    if not 0 <= shared <= most:
        raise ValueError(f"shared_blocks: got {shared}, expected 0 to {most} of this cache")
    reasons: dict[Implementation, str | None] = {
        "pallas": _decode(cache, queries),
        "cudnn": "shared blocks" if shared else _prefill(cache, queries, softcap),
        "xla": None,
    }
    attend = resolve(implementation, reasons)
    below: Implementation | None = "xla" if attend == "xla" else None
    pages = resolve(below, {"pallas": _pages(cache), "xla": None})
    return Attention(attend, pages, choose_compression(cache, below), shared)


def _decode(cache: Cache, queries: int) -> str | None:
    """Why the fused kernel does not attend, or None if it does."""
    if queries > MAX_QUERIES:
        return f"{queries} query tokens per sequence, served are up to {MAX_QUERIES}"
    if queries > 1 and cache.config.sliding_window is not None:
        return f"{queries} query tokens per sequence behind a sliding window, served is 1"
    if jnp.dtype(cache.config.dtype).itemsize not in (2, 4):
        return f"a full precision of {cache.config.dtype}, served are 16 and 32 bits"
    return _blocks(cache)


def _pages(cache: Cache) -> str | None:
    """Why the kernel does not decode pages to vectors, or None if it does."""
    return SKETCHED if _sketched(cache) else _blocks(cache)


def _sketched(cache: Cache) -> bool:
    return any(part.codecs[0].sketch is not None for part in cache.parts)


def _blocks(cache: Cache) -> str | None:
    """Why the kernels do not read the blocks of a cache, or None if they do."""
    if not cache.layout.slots:
        return "a cache without blocks"
    if (reason := no_gpu() or _heads(cache)) is not None:
        return reason
    for part in cache.parts:
        for group in (group for codec in part.codecs for group in codec.groups):
            if kernel_operands.codebook_of(group) is None:
                return "a codebook off the kernel's grid; use codebook='grid' or 'uniform'"
    return None


def _prefill(cache: Cache, queries: int, softcap: float | None) -> str | None:
    """Why the vendor's attention over decoded tiles does not attend, or None if it does."""
    if queries == 1:
        return "one query token per sequence, served are more"
    if jax.default_backend() != "gpu":
        return f"the backend {jax.default_backend()!r}, served is 'gpu'"
    if jnp.dtype(cache.config.dtype).itemsize != 2:
        return f"a full precision of {cache.config.dtype}, served are 16 bits"
    # what cuDNN serves on every GPU that the kernels run on
    if cache.config.head_dim % 8 or cache.config.head_dim > 128:
        return f"a head dim of {cache.config.head_dim}, served are multiples of 8 up to 128"
    return None if softcap is None else "a soft cap"


def _compression(cache: Cache) -> str | None:
    """Why the kernel does not compress, or None if it does."""
    if (reason := no_gpu()) is not None:
        return reason
    if max(map(_formats, cache.config.places)) > 1:
        return "heads of one layer in several formats"
    if cache.config.block not in PAGE_TOKENS:
        return f"blocks of {cache.config.block} tokens, served are {PAGE_TOKENS}"
    if _sketched(cache):
        return SKETCHED
    if not (cache.config.key.coded and cache.config.value.coded):
        return "keys or values in full precision beside coded ones"
    for codec in (codec for part in cache.parts for codec in part.codecs):
        if codec.transform is not None:
            return JOINT
        if codec.order is not None:
            return "channels in an order of their own"
        for group in codec.groups:
            if group.code != "scalar":
                return f"a {group.code} code, served are scalar codes"
            if group.scale_dtype != jnp.bfloat16:
                return f"scales in {group.scale_dtype}, served is bfloat16"
            if group.dim % 8:
                return f"a group of {group.dim} channels, served are multiples of 8"
    return None


def _heads(cache: Cache) -> str | None:
    """Why the heads of a layer are not served by one kernel, or None if they are."""
    most = max(map(_formats, cache.config.places))
    if most > MAX_FORMATS:
        return f"heads of one layer in {most} formats, served are up to {MAX_FORMATS}"
    if most > 1 and _sketched(cache):
        return "heads of one layer in several formats, with a sketch"
    return None


def _formats(place: tuple[int, ...]) -> int:
    """Of the heads of a layer."""
    return len(set(place))
