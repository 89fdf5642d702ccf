"""Every experiment, in the order of the report."""

from experiments import distortion, inner_product, nearest_neighbor, quantization_time
from experiments.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    distortion,
    inner_product,
    nearest_neighbor,
    quantization_time,
)
