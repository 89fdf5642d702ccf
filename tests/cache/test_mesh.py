"""What a mesh cannot divide is refused in words; which shard has what is arithmetic."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from turboquant_jax import cache
from turboquant_jax.cache import Allocation, CacheConfig
from turboquant_jax.cache.layout import STRIPE, Layout, Share, block_slots
from turboquant_jax.cache.mesh import AXES, head_order, local_config, make_mesh

CONFIG = CacheConfig(2, 4, 16)


def mesh(data=1, tensor=1, context=1):
    return AbstractMesh((data, tensor, context), AXES)


@pytest.mark.parametrize(
    "changes, sizes, says",
    [
        ({}, dict(tensor=3), "tensor: got 3 shards of 4 kv heads"),
        (
            dict(sliding_window=512),
            dict(context=2),
            "context: got 2 shares behind a sliding window",
        ),
        (dict(block=72), dict(context=2), "block: got 72 tokens with 2 context shares"),
        (
            dict(allocation=Allocation((4, (4, 4, 4, 3)), (4, 4))),
            dict(tensor=2),
            r"layer 1: got \[\[2, 0\], \[1, 1\]\] heads of each format on 2 shards",
        ),
    ],
)
def test_what_cannot_be_divided(changes, sizes, says):
    with pytest.raises(ValueError, match=says):
        local_config(replace(CONFIG, **changes), mesh(**sizes))


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match="mesh: got data=1, tensor=99, context=1"):
        make_mesh(tensor=99)


def test_heads_come_in_the_order_of_their_formats():
    mixed = (4, 3, 3, 4)
    config = replace(CONFIG, allocation=Allocation((4, mixed), (4, mixed)))
    order = head_order(config, mesh(tensor=2))
    assert order.tolist() == [[0, 1, 0, 1], [0, 1, 1, 0]]  # format 4 is met first
    own = local_config(config, mesh(tensor=2))
    assert own.num_kv_heads == 2 and own.allocation.keys == (4, (4, 3))


@pytest.mark.parametrize("shares", [2, 3, 8])
@pytest.mark.parametrize("block", [8, 64, 4096])
def test_every_block_is_on_one_share_and_the_work_is_balanced(shares, block):
    config = replace(CONFIG, block=block)
    layouts = [Layout(config, 4, 128 + block, 1, Share(np.int32(i), shares)) for i in range(shares)]
    for length in (0, 4000, 4300, 20_000, 100_000):
        counts = [int(layout.num_blocks(length)) for layout in layouts]
        numbers = [int(layout.number(j)) for layout, n in zip(layouts, counts) for j in range(n)]
        assert sorted(numbers) == list(range(config.num_blocks(length)))
        assert block * (max(counts) - min(counts)) <= STRIPE
        assert max(counts) == counts[0] == block_slots(config, length, shares)


def test_a_saved_cache_is_one_of_one_device(tmp_path):
    from turboquant_jax.cache import storage

    state = cache.create(replace(CONFIG, num_layers=1), 1, 300, key=jax.random.key(0))
    storage.save(state, tmp_path / "one", model="m")
    assert (tmp_path / "one").is_file()
