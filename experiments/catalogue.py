"""Every experiment, in the order of the report."""

from collections.abc import Callable, Sequence
from types import ModuleType

from experiments import (
    bit_width_ablation,
    codebook_ablation,
    decode_speed,
    distortion,
    encode_speed,
    fidelity,
    inner_product,
    layer_ablation,
    llama_speed,
    nearest_neighbor,
    needle,
    prefill_speed,
    qjl_ablation,
    quantization_time,
    questions,
    rotation_ablation,
    scale_ablation,
    speed_claims,
    step_speed,
)
from experiments.experiment import Claim, Experiment, Row

EXPERIMENTS: tuple[Experiment, ...] = (
    distortion,
    inner_product,
    nearest_neighbor,
    quantization_time,
    rotation_ablation,
    scale_ablation,
    codebook_ablation,
    bit_width_ablation,
    fidelity,
    needle,
    questions,
    qjl_ablation,
    layer_ablation,
    llama_speed,
)

SPEED: tuple[tuple[ModuleType, Callable[[Sequence[Row]], list[Claim]]], ...] = (
    (decode_speed, speed_claims.decode),
    (step_speed, speed_claims.step),
    (encode_speed, speed_claims.encode),
    (prefill_speed, speed_claims.prefill),
)
"""Scripts that need a GPU, and what their rows say; they have a command line of their own."""
