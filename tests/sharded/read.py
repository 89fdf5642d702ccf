"""Where a cache on a mesh has what, from the documentation alone, in NumPy.

`data` has sequences, `tensor` heads, `context` stripes of tokens in turn, here short ones.
"""

from typing import NamedTuple

import jax
import numpy as np

STRIPE = 32  # so that a short context has many; in use it is 4,096


class Sizes(NamedTuple):
    data: int = 1
    tensor: int = 1
    context: int = 1


def num_blocks(config, length):
    return max(0, length - config.sinks - config.window) // config.block


def heads(config, sizes):
    """[layers][shard]: numbers of heads in the order that the shard has them, and their formats."""
    count, found = config.num_kv_heads // sizes.tensor, []
    if sizes.tensor == 1:
        return [[list(range(count))]] * config.num_layers
    for place in config.places:
        formats = list(place) * (config.num_kv_heads // len(place))
        found.append(
            [
                sorted(range(t * count, (t + 1) * count), key=lambda head: formats[head])
                for t in range(sizes.tensor)
            ]
        )
    return found


def rows(config, sizes):
    """{(layer, head): (part, row)} in the pools of all shards, one after the other."""
    found, last, order = {}, [0] * len(config.formats), heads(config, sizes)
    for t in range(sizes.tensor):
        for layer, place in enumerate(config.places):
            for head in order[layer][t]:
                part = place[head % len(place)]
                found[layer, head] = part, last[part]
                last[part] += 1
    return found


def pages(cache, sizes):
    """{(sequence, block): page} in the pools of all shards, one after the other."""
    config, table = cache.config, np.asarray(cache.table.page_table)
    batch, slots = table.shape[0], table.shape[1] // sizes.context
    count = cache.table.references.shape[0] // (sizes.data * sizes.context)
    stripe, found = STRIPE // config.block, {}
    for sequence, length in enumerate(np.asarray(cache.lengths).tolist()):
        shard = sequence // (batch // sizes.data)
        for block in range(num_blocks(config, length)):
            number, share = block, 0
            if sizes.context > 1:
                turn, share = divmod(block // stripe, sizes.context)
                number = turn * stripe + block % stripe
            page = table[sequence, share * slots + number]
            assert 0 <= page < count
            found[sequence, block] = page + (shard * sizes.context + share) * count
    return found


def stored(cache, sizes):
    """Every bit that counts, by what it is of: the same for every mesh."""
    found = {"lengths": cache.lengths, "overflow": cache.overflow, "pending": cache.table.pending}
    order = [np.concatenate(layer) for layer in heads(cache.config, sizes)]
    where = np.argsort(order, axis=1)
    for name in ("sinks", "window"):
        for side in ("keys", "values"):
            held = np.asarray(getattr(getattr(cache, name), side))
            found[name, side] = np.stack([x[..., w, :] for x, w in zip(held, where)])
    if cache.key_mean is not None:
        held = np.asarray(cache.key_mean)
        found["mean"] = np.stack([x[:, w] for x, w in zip(held, where)])
    own = pages(cache, sizes)
    pools = [jax.tree.map(np.asarray, part.pool) for part in cache.parts]
    for (layer, head), (part, row) in rows(cache.config, sizes).items():
        leaves = jax.tree_util.tree_leaves_with_path(pools[part])
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path)
            found[layer, head, name] = np.stack(
                [leaf[row, page] for _, page in sorted(own.items())]
            )
    return found


def assert_equal(got, expected, edges=0.0):
    """Bit for bit; but of codes of a byte such a share may be the next ones."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        array, other = np.asarray(array), np.asarray(got[name])
        assert array.dtype == other.dtype and array.shape == other.shape, name
        if edges and array.dtype == np.uint8:
            unlike = array != other
            assert np.mean(unlike) <= edges, name
            array, other = (x.astype(np.int32)[unlike] for x in (array, other))
            np.testing.assert_array_equal(np.abs(array - other), 1, str(name))
        else:
            assert array.tobytes() == other.tobytes(), name
