"""Schedules of the decode kernel, and the pairs of numbers that flags name."""

import itertools

from experiments.speed.common import CHANNELS, HEADS, KV_HEADS
from experiments.speed.decode_blocks import PAGE, Pair
from pallas_kernels.decode_attention import Schedule, default_schedule
from pallas_kernels.primitives.codebook import CodeKind

GROUP = HEADS // KV_HEADS


def schedule_of(bits: Pair, shape: Pair, code: CodeKind = "scalar") -> Schedule:
    """What the kernel chooses by itself."""
    return default_schedule(
        sequences=shape[0] * KV_HEADS,
        heads=GROUP,
        channels=CHANNELS,
        bits=5 if code == "trellis" and max(bits) == 4 else max(bits),  # 32 levels
        tokens=PAGE,
        max_pages=shape[1] // PAGE,
        work="little" if bits == (4, 4) and code == "scalar" else "usual",
    )


def sweep_schedules(shape: Pair, choices: str) -> list[Schedule]:
    """'512,1024;1,2;2;3': programs; pages; warps; stages."""
    programs, pages, warps, stages = (
        [int(x) for x in part.split(",")] for part in choices.split(";")
    )
    batch, tokens = shape
    found = []
    for p, w, st, n in itertools.product(pages, warps, stages, programs):
        splits = max(1, min(n // (batch * KV_HEADS), tokens // (PAGE * p)))
        found.append(Schedule(splits=splits, pages=p, warps=w, stages=st))
    return list(dict.fromkeys(found))


def pairs(text: str, mark: str) -> list[Pair]:
    """'32x4096,1x8192' -> [(32, 4096), (1, 8192)]."""
    split = [part.split(mark) for part in text.split(",") if part]
    return [(int(first), int(second)) for first, second in split]
