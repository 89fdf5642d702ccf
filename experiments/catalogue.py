"""Every experiment, in the order of the report."""

from collections.abc import Callable, Sequence
from types import ModuleType

from experiments.fidelity import fidelity, layer_ablation, qjl_ablation
from experiments.harness.experiment import Claim, Experiment, Row
from experiments.peers import nearest_neighbor, quantization_time
from experiments.quantizers import (
    bit_width_ablation,
    codebook_ablation,
    distortion,
    inner_product,
    rotation_ablation,
    scale_ablation,
)
from experiments.speed import (
    decode_speed,
    encode_speed,
    llama_speed,
    prefill_speed,
    speed_claims,
    step_speed,
)
from experiments.tasks import needle, questions

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
