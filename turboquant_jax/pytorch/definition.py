"""Attention over a compressed cache in torch: the specification, `attention.definition`.

Correct on any device, and slow: every page is decoded for every call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_jax.pytorch import packing, pre_rope
from turboquant_jax.pytorch.segments import Scores, SegmentPart, attend_segment, merge
from turboquant_jax.pytorch.state import Member, Part, State

SCORES = 2**27
"""Most scores at a time, of as many queries as that allows."""


def attend(
    state: State,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of T new tokens over the cache of a layer and over themselves: [B, T, N, H].

    Args:
      state: holds `lengths` tokens of each sequence; the new ones are not in it yet.
      layer: which layer.
      q: [B, T, N, H] after RoPE.
      k, v: [B, T, K, H]. Rows of padding at the end change nothing for the rows before them.
      scores: scale and soft cap.
      sink_logits: [N], a logit per query head without a value, or None.
    """
    layout = state.layout
    keys = layout.sinks + layout.ring + layout.slots * state.config.block + k.shape[1]
    count = max(1, SCORES // (q.shape[0] * q.shape[2] * keys))
    parts = []
    for first in range(0, q.shape[1], count):
        some = q[:, first : first + count]
        seen = first + some.shape[1]  # of the chunk itself
        parts.append(
            _attend(state, layer, some, k[:, :seen], v[:, :seen], first, scores, sink_logits)
        )
    return torch.cat(parts, dim=1).to(q.dtype)


def attend_to_itself(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """`attend` over an empty cache, without a cap: torch's own causal attention of a chunk."""
    q, k, v = (x.transpose(1, 2) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    output = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scores.factor(q.shape[3]), enable_gqa=True
    )
    return output.transpose(1, 2)


def _attend(state, layer, q, k, v, first, scores, sink_logits) -> Tensor:
    query = torch.arange(q.shape[1], dtype=torch.int32, device=q.device) + first
    query = state.table.lengths[:, None] + query
    parts = [_exact(state, layer, q, k, v, query, scores)]
    if state.layout.slots:
        parts.append(_blocks(state, layer, q, query, scores))
    if sink_logits is not None:
        lse = sink_logits.to(torch.float32).expand(q.shape[:-1])
        parts.append((torch.zeros(q.shape, dtype=torch.float32, device=q.device), lse))
    return merge(parts)[0]


def _exact(state: State, layer: int, q, k, v, query, scores: Scores) -> SegmentPart:
    """Sinks, window and the new tokens themselves: everything in full precision."""
    dtype, layout = state.window.keys.storage.dtype, state.layout
    segments = state.sinks, state.window
    keys = torch.cat([*(s.keys.tensor[layer] for s in segments), k.to(dtype)], dim=1)
    values = torch.cat([*(s.values.tensor[layer] for s in segments), v.to(dtype)], dim=1)
    lengths = state.table.lengths[:, None]
    position, held = layout.exact_positions(lengths)
    new = lengths + torch.arange(k.shape[1], dtype=torch.int32, device=k.device)
    position = torch.cat([position, new], dim=1)
    held = torch.cat([held, torch.ones_like(new, dtype=torch.bool)], dim=1)
    visible = held[:, None] & layout.sees(query, position, state.config.sliding_window)
    return attend_segment(q, keys, values, visible, scores)


def _blocks(state: State, layer: int, q: Tensor, query: Tensor, scores: Scores) -> SegmentPart:
    """The compressed blocks of all heads, member by member, in their rotated spaces."""
    layout, heads = state.layout, state.config.num_kv_heads
    position, held = layout.block_positions(state.table.lengths[:, None])
    visible = held[:, None] & layout.sees(query, position, state.config.sliding_window)
    grouped = q.to(torch.float32).unflatten(2, (heads, -1))  # [B, T, K, G, H]
    output = torch.zeros_like(grouped)
    lse = grouped.new_zeros(grouped.shape[:-1])
    for member in state.members[layer]:
        part, own = state.parts[member.part], list(member.heads)
        whole = len(own) == heads
        some = grouped if whole else grouped[:, :, own]
        keys, values = decoded(state, part, member)
        bias = _mean_products(state, layer, member, some, position)
        turned = part.codecs[0].rotate_query(member.rows, some.transpose(2, 3)).transpose(2, 3)
        found, own_lse = attend_segment(turned.flatten(2, 3), keys, values, visible, scores, bias)
        found = found.unflatten(2, (len(own), -1)).transpose(2, 3)
        found = part.codecs[1].unrotate(member.rows, found).transpose(2, 3)
        own_lse = own_lse.unflatten(2, (len(own), -1))
        if whole:
            return found.flatten(2, 3), own_lse.flatten(2, 3)
        output[:, :, own], lse[:, :, own] = found, own_lse
    return output.flatten(2, 3), lse.flatten(2, 3)


def decoded(state: State, part: Part, member: Member) -> tuple[Tensor, Tensor]:
    """Keys and values [B, S, heads, H] of the pages of all sequences, rotated, float32."""
    table = state.table.page_table.clamp(min=0).long()
    tokens = state.config.block

    def pages(rows) -> Tensor:
        return rows.tensor[member.rows][:, table]  # [heads, B, slots, ...]

    words = [packing.scales_of(pages(rows)) for rows in part.pool.scales]
    found = []
    for side, (codec, planes) in enumerate(
        zip(part.codecs, (part.pool.keys, part.pool.values), strict=True)
    ):
        codes = []
        for number, (group, own) in enumerate(zip(codec.groups, planes, strict=True)):
            constants = group.constants
            count = tokens if side else constants.dim
            indices = packing.unpack([pages(p) for p in own], constants.plane_widths, count)
            indices = indices.transpose(-1, -2) if side else indices
            codes.append((indices, words[number % codec.scale_count][side]))
        vectors = codec.dequantize(codes)  # [heads, B, slots, T, H]
        found.append(vectors.movedim(0, 3).flatten(1, 2))
    return found[0], found[1]


def _mean_products(
    state: State, layer: int, member: Member, q: Tensor, position: Tensor
) -> Tensor | None:
    """<q, R_p m> [B, T, N, S], which centring took from the compressed keys; None without it."""
    if state.key_mean is None:
        return None
    mean = state.key_mean[layer]
    mean = mean if mean.shape[1] == len(member.heads) else mean[:, list(member.heads)]
    index = position[:, :1] if state.phases is None else position
    taken = pre_rope.mean_at(mean, state.phases, index - state.config.sinks)
    return torch.einsum("btkgh,bskh->btkgs", q, taken).flatten(2, 3)
