"""What a mesh cannot divide is refused in words; which shard has what is arithmetic."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from turboquant_jax import cache
from turboquant_jax.cache import Allocation, CacheConfig, sharding
from turboquant_jax.cache.allocation import Losses, nested
from turboquant_jax.cache.bytes import planned_bytes
from turboquant_jax.cache.choice import choose, choose_on_shards
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


@pytest.mark.parametrize("shards", [2, 4])
def test_an_allocation_for_shards_is_one_that_a_mesh_takes(shards):
    """And it loses less than any uniform one within its budget; heads differ widely."""
    rng = np.random.default_rng(shards)
    formats, costs = (1, 2, 3, 4), ((1, 2, 3, 4), (1, 2, 3, 4))
    heads = np.exp(2 * rng.normal(size=(2, 3, 8, 1)))
    lost = heads * 4.0 ** -np.arange(1, 5) * np.exp(rng.normal(size=(2, 3, 8, 4)) / 8)
    losses = Losses(formats, formats, nested(lost[0]), nested(lost[1]))
    config = CacheConfig(3, 8, 16)
    for bits in (1, 2, 3):
        budget = 3 * 8 * 2 * bits + 5
        found = choose_on_shards(losses, costs, budget, shards)
        assert sum(map(sum, found.keys)) + sum(map(sum, found.values)) <= budget
        local_config(replace(config, allocation=found), mesh(tensor=shards))
        same = Allocation(*[((bits,) * 8,) * 3] * 2)
        assert losses.of(found) < losses.of(same)
        assert losses.of(found) >= losses.of(choose(losses, costs, budget)) * 0.999
    mixed = choose(losses, costs, 3 * 8 * 2 * 2)
    with pytest.raises(ValueError, match=f"calibrate --tensor {shards}"):
        local_config(replace(config, allocation=mixed), mesh(tensor=shards))


def test_shards_that_do_not_divide_the_heads():
    losses = Losses((1, 2), (1, 2), *[(((2.0, 1.0),) * 3,)] * 2)
    with pytest.raises(ValueError, match="shards: got 2 of 3 kv heads"):
        choose_on_shards(losses, ((1, 2), (1, 2)), 100, 2)


@pytest.mark.parametrize(
    "sizes", [dict(tensor=2), dict(data=2, context=2), dict(tensor=4)], ids=str
)
@pytest.mark.parametrize("length", [300, 20_000])
def test_a_shard_takes_its_part_of_the_bytes(sizes, length):
    """Pages and heads are split; tables of angles and codecs are on every device."""
    own, one = (sharding.planned_bytes(mesh(**every), CONFIG, 4, length) for every in (sizes, {}))
    assert one == planned_bytes(CONFIG, 4, length)
    tensor, data = sizes.get("tensor", 1), sizes.get("data", 1)
    blocks = block_slots(CONFIG, length, sizes.get("context", 1)) / block_slots(CONFIG, length)
    assert own.window * tensor * data == one.window and own.codecs == one.codecs
    assert own.key_codes * tensor * data == pytest.approx(one.key_codes * blocks)
    assert own.scales * tensor * data == pytest.approx(one.scales * blocks)


def test_a_saved_cache_is_one_of_one_device(tmp_path):
    from turboquant_jax.cache import storage

    state = cache.create(replace(CONFIG, num_layers=1), 1, 300, key=jax.random.key(0))
    storage.save(state, tmp_path / "one", model="m")
    assert (tmp_path / "one").is_file()
