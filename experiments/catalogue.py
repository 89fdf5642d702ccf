"""Every experiment, in the order of the report."""

from experiments import distortion
from experiments.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (distortion,)
