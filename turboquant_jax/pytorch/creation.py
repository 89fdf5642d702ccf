"""How an empty torch cache is made: its tensors, and the codecs of its heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch import codec, constants, pages, pre_rope
from turboquant_jax.pytorch.codec import Codec
from turboquant_jax.pytorch.layout import block_slots
from turboquant_jax.pytorch.state import Blocks, Exact, Part, Rows, State, Table
from turboquant_jax.quantizers.formats import plane_bytes


def create(
    config: CacheConfig,
    batch: int,
    capacity: int,
    *,
    seed: int = 0,
    num_pages: int | None = None,
    orders: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    calibration: Any = None,
    like: State | None = None,
    device: torch.device | str = "cpu",
) -> State:
    """An empty cache, as `cache.create` makes it of `jax.random.key(seed)`.

    Args:
      config: its static description.
      batch: sequences B.
      capacity: most tokens of one sequence.
      seed: of the rotations.
      num_pages: pages of a pool that the sequences share; pages for the whole capacity of every
        sequence unless given.
      orders: channels [layers, K, H] of keys and of values in the order of the codec's groups.
      calibration: of the model, for codecs with joint scales: `cache.calibration.Calibration`, or
        whatever has its fields.
      like: a cache whose codecs this one has, in the place of what a seed and the others make.
      device: where its tensors lie.

    Raises:
      ValueError: a batch, capacity, number of pages, order, codec or calibration that cannot be.
    """
    slots, dense = block_slots(config, capacity), num_pages is None
    count = batch * slots if num_pages is None else num_pages
    if batch < 1 or capacity < 1 or count < min(slots, 1):
        raise ValueError(
            f"batch, capacity and num_pages: got {batch}, {capacity} and {count}, "
            "expected positive ones"
        )
    device, (layers, heads, dim) = torch.device(device), _sizes(config)
    for order in orders:
        if order is not None and order.shape != (layers, heads, dim):
            raise ValueError(
                f"order of channels: got {order.shape}, expected {(layers, heads, dim)}"
            )
    dtype = getattr(torch, config.dtype)

    def exact(slots: int) -> Exact:
        lead = (layers, batch, slots)
        return Exact(*(Rows(lead, (heads, dim), dtype, device) for _ in range(2)))

    if like is None:
        codecs = _codecs(config, seed, (orders, _bases(config, calibration)), device)
    else:
        codecs = [part.codecs for part in like.parts]
    parts = (_part(config, number, own, count) for number, own in enumerate(codecs))
    return State(
        config=config,
        capacity=capacity,
        table=_table(batch, slots, count, dense, device),
        sinks=exact(min(config.sinks, capacity)),
        window=exact(max(0, min(config.window + config.block, capacity - config.sinks))),
        key_mean=torch.zeros(layers, batch, heads, dim, device=device)
        if config.center_keys
        else None,
        phases=pre_rope.create(config, capacity, device),
        parts=tuple(parts),
    )


def _sizes(config: CacheConfig) -> tuple[int, int, int]:
    return config.num_layers, config.num_kv_heads, config.head_dim


def _table(batch: int, slots: int, count: int, dense: bool, device: torch.device) -> Table:
    def full(shape, value: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=device)

    identity = torch.arange(batch * slots, dtype=torch.int32, device=device).view(batch, slots)
    return Table(
        lengths=full((batch,), 0),
        pending=full((batch,), 0),
        overflow=torch.zeros(batch, dtype=torch.bool, device=device),
        page_table=identity if dense else full((batch, slots), pages.UNASSIGNED),
        pending_pages=full((batch, slots), pages.UNASSIGNED),
        references=full((count,), int(dense)),
    )


def _bases(config: CacheConfig, calibration: Any) -> list[tuple[np.ndarray, ...] | None]:
    """Matrix, inverse and variance [layers, K, ...] of keys and of values; None where not asked."""
    found: list[tuple[np.ndarray, ...] | None] = []
    for name in ("key", "value"):
        if getattr(config, name).scales == "group":
            found.append(None)
            continue
        basis = None if calibration is None else getattr(calibration, f"{name}s")
        got = None if basis is None else basis.variance.shape
        if basis is None or got != _sizes(config):
            raise ValueError(
                f"calibration of the {name}s: got {got} layers, heads and channels, "
                f"expected {_sizes(config)}"
            )
        found.append(tuple(np.asarray(x) for x in (basis.matrix, basis.inverse, basis.variance)))
    return found


def _codecs(
    config: CacheConfig, seed: int, of_heads, device: torch.device
) -> list[tuple[Codec, Codec]]:
    """The codecs of every format, by the orders and bases of all heads."""
    found = []
    for number, pair in enumerate(constants.codecs_of(config, seed)):
        layer, head = np.transpose(_heads_of(config, number))
        key, value = (
            codec.create(
                own,
                None if order is None else order[layer, head],
                None if basis is None else tuple(x[layer, head] for x in basis),
                device,
            )
            for own, order, basis in zip(pair, *of_heads, strict=True)
        )
        found.append((key, value))
    return found


def _part(config: CacheConfig, number: int, codecs: tuple[Codec, Codec], count: int) -> Part:
    rows, device = _heads_of(config, number), codecs[0].groups[0].levels.device
    pool = _empty(codecs, (len(rows), count), config.block, device)
    layer, head = (torch.tensor(x, device=device) for x in np.transpose(rows))
    return Part(codecs, pool, rows, layer, head)


def _heads_of(config: CacheConfig, part: int) -> tuple[tuple[int, int], ...]:
    """(layer, kv head) of every row of a part."""
    return tuple(
        (layer, head)
        for layer, own in enumerate(config.places)
        for head, p in enumerate(own * config.num_kv_heads if len(own) == 1 else own)
        if p == part
    )


def _empty(codecs: Sequence[Codec], lead: tuple[int, int], tokens: int, device) -> Blocks:
    def planes(count: int, group: codec.Group, rows: int) -> tuple[Rows, ...]:
        return tuple(
            Rows(lead, (rows, plane_bytes(count, width)), torch.uint8, device)
            for width in group.constants.plane_widths
        )

    keys, values = (own.groups for own in codecs)
    words = max(own.scale_count for own in codecs)
    return Blocks(
        tuple(planes(group.constants.dim, group, tokens) for group in keys),
        tuple(planes(tokens, group, group.constants.dim) for group in values),
        tuple(Rows(lead, (tokens,), torch.int32, device) for _ in range(words)),
    )
