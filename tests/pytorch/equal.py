"""A torch cache beside the JAX one, and tokens whose codes hang on no order of a sum."""

from dataclasses import replace

import jax
import numpy as np

from tests.pytorch.skip import torch
from turboquant_jax.pytorch import creation, updating

DRAWS = 3


def assert_equal(jax_cache, own):
    """Every tensor of both, bit for bit."""
    expected, got = leaves_of(jax_cache), own.leaves
    assert expected.keys() == got.keys()
    for name, leaf in expected.items():
        array = got[name]
        array = array.view(torch.uint16) if array.dtype == torch.bfloat16 else array
        leaf = leaf.view(np.uint16) if leaf.dtype.name == "bfloat16" else leaf
        np.testing.assert_array_equal(leaf, array.numpy(), err_msg=name)


def adopt(own, jax_cache):
    """Give a torch cache the bits of a JAX one."""
    for name, leaf in leaves_of(jax_cache).items():
        array = own.leaves[name]
        if leaf.dtype.name == "bfloat16":
            leaf, array = leaf.view(np.uint16), array.view(torch.uint16)
        array.copy_(torch.from_numpy(np.array(leaf)))


def leaves_of(cache):
    """Leaves of a JAX cache by the names that the torch cache gives them."""
    table = cache.table
    found = {name: getattr(table, name) for name in vars(table)}
    for name in ("sinks", "window"):
        segment = getattr(cache, name)
        found |= {f"{name}.{side}": getattr(segment, side) for side in ("keys", "values")}
    if cache.key_mean is not None:
        found["key_mean"] = cache.key_mean
    for number, part in enumerate(cache.parts):
        for place, leaf in enumerate(jax.tree.leaves(part.pool)):
            found[f"parts.{number}.{place}"] = leaf
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def robust_tokens(config, count, sequences, rng, **options):
    """Keys and values [layers, sequences, count, K, H], none of them near a tie.

    Float32 sums in another order move a coordinate by a few 1e-7 of itself. Tokens whose block
    changes when thresholds and levels move by 1e-5 are drawn again.
    """
    shape = (config.num_layers, sequences, count, config.num_kv_heads, config.head_dim)
    dtype = getattr(torch, config.dtype)
    sides = [torch.from_numpy(rng.normal(1, 1, shape).astype(np.float32)).to(dtype) for _ in "kv"]
    for _ in range(30):
        plain = _filled(config, sides, 0.0, rng, options)
        tied = torch.zeros(sequences, config.num_blocks(count), dtype=torch.bool)
        for _ in range(DRAWS):
            for leaf, other in zip(plain, _filled(config, sides, 1e-5, rng, options), strict=True):
                differs = (leaf != other).flatten(2).any(dim=2).any(dim=0)
                tied |= differs.view(tied.shape)
        if not tied.any():
            return [side.float().numpy() for side in sides]
        for row, block in tied.nonzero().tolist():
            start = config.sinks + block * config.block
            for side in sides:
                part = side[:, row, start : start + config.block]
                part.copy_(torch.from_numpy(rng.normal(1, 1, part.shape).astype(np.float32)))
    raise AssertionError("no tokens without ties")


def _filled(config, sides, noise, rng, options):
    """The pages of a cache that holds them, its codecs' constants moved by relative noise."""
    plain = replace(config, sliding_window=None)
    own = creation.create(plain, *sides[0].shape[1:3], **options)

    def moved(x):
        return x * (1 + noise * torch.from_numpy(rng.uniform(-1, 1, x.shape).astype(np.float32)))

    parts = []
    for part in own.parts:
        codecs = [
            replace(codec, groups=tuple(
                replace(g, levels=moved(g.levels), edges=moved(g.edges)) for g in codec.groups
            ))
            for codec in part.codecs
        ]  # fmt: skip
        parts.append(replace(part, codecs=tuple(codecs)))
    own = replace(own, parts=tuple(parts))
    updating.append(own, *sides)
    return [rows.tensor for part in own.parts for rows in part.pool.rows]
