"""The GPU kernel's view of compression: which blocks of a source become which pages."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import encode as kernel
from turboquant_jax.cache import operands
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.operands import flat
from turboquant_jax.cache.state import Cache, Exact
from turboquant_jax.quantizer import Quantizer


def unserved(cache: Cache) -> str | None:
    """Why the kernel does not compress this cache on this device, or None if it does."""
    if jax.default_backend() != "gpu":
        return f"the backend {jax.default_backend()!r}, served is 'gpu'"
    if cache.config.block not in kernel.PAGE_TOKENS:
        return f"blocks of {cache.config.block} tokens, served are {kernel.PAGE_TOKENS}"
    for codec in cache.codecs:
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


def encode(
    cache: Cache,
    source: Exact,
    jobs: Int[Array, "jobs 5"],
) -> Cache:
    """Compress blocks of `source`, [rows, slots, K, H], into pages; see `kernel.encode`.

    Pages and rows of the key means are counted through all layers.
    """
    dtype = source.keys.dtype
    pool = kernel.Pool(
        keys=_groups(cache.codecs[0].groups, cache.pool.keys, dtype),
        values=_groups(cache.codecs[1].groups, cache.pool.values, dtype),
        scales=tuple(flat(x) for x in cache.pool.scales),
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
    )
    made = kernel.encode(source.keys, source.values, jobs, pool)
    found = Blocks(
        tuple(group.planes for group in made.keys),
        tuple(group.planes for group in made.values),
        made.scales,
    )
    back = lambda new, old: new.reshape(old.shape)  # noqa: E731
    return replace(
        cache,
        pool=jax.tree.map(back, found, cache.pool),
        key_mean=None if cache.key_mean is None else back(made.key_mean, cache.key_mean),
    )


def _groups(groups: tuple[Quantizer, ...], planes: tuple, dtype) -> tuple[kernel.Group, ...]:
    return tuple(
        kernel.Group(
            tuple(flat(plane) for plane in own),
            operands.with_signs(operands.of_rotation(group.rotation, dtype)),
            kernel.Code(group.levels, group.scale),
        )
        for group, own in zip(groups, planes, strict=True)
    )
