"""Every experiment, in the order of the report."""

from experiments import (
    bit_width_ablation,
    codebook_ablation,
    distortion,
    inner_product,
    llama_speed,
    nearest_neighbor,
    quantization_time,
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
    llama_speed,
)
