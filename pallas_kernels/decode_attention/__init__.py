"""Attention of one query token a sequence over compressed keys and values, and over exact ones."""

from pallas_kernels.decode_attention.call import decode_attention
from pallas_kernels.decode_attention.exact import ExactOperand, ExactPlaces
from pallas_kernels.decode_attention.inputs import PagedBlocks, Sketch, Softmax
from pallas_kernels.decode_attention.phases import PhasesOperand
from pallas_kernels.decode_attention.schedule import Schedule, default_schedule
from pallas_kernels.primitives.blocks import BlocksOperand
from pallas_kernels.primitives.codebook import CodebookOperand
from pallas_kernels.primitives.rotation import RotationOperand

__all__ = [
    "BlocksOperand",
    "CodebookOperand",
    "ExactOperand",
    "ExactPlaces",
    "PagedBlocks",
    "PhasesOperand",
    "RotationOperand",
    "Schedule",
    "Sketch",
    "Softmax",
    "decode_attention",
    "default_schedule",
]
