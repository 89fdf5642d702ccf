"""Attention of one query token a sequence over compressed keys and values, and over exact ones."""

from pallas_kernels.decode_attention.call import decode_attention
from pallas_kernels.decode_attention.inputs import PagedBlocks, Sketch, Softmax
from pallas_kernels.decode_attention.recent import Places, Recent
from pallas_kernels.decode_attention.schedule import Schedule, default_schedule
from pallas_kernels.primitives.blocks import Blocks
from pallas_kernels.primitives.codebook import Codebook
from pallas_kernels.primitives.rotation import Rotation

__all__ = [
    "Blocks",
    "Codebook",
    "PagedBlocks",
    "Places",
    "Recent",
    "Rotation",
    "Schedule",
    "Sketch",
    "Softmax",
    "decode_attention",
    "default_schedule",
]
