"""Every experiment, in the order of the report."""

from experiments import (
    bit_width_ablation,
    codebook_ablation,
    distortion,
    fidelity,
    inner_product,
    layer_ablation,
    llama_speed,
    nearest_neighbor,
    needle,
    qjl_ablation,
    quantization_time,
    questions,
    rotation_ablation,
    scale_ablation,
)
from experiments.experiment import Experiment

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
