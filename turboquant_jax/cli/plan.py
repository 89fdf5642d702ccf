"""`turboquant-jax plan`."""

import argparse
from dataclasses import asdict

from rich.console import Console

from turboquant_jax import plan
from turboquant_jax.cli import settings


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Plan and print."""
    kind = settings.calibrated(arguments, plan.read_model(arguments.model))
    result = plan.plan(
        arguments.model,
        arguments.memory,
        arguments.batch,
        settings.with_table(settings.asked_bits(arguments)),
        weight_bits=arguments.weight_bits,
        **settings.segments(arguments),
        allocated=[] if kind is None else [kind.config],
    )
    plan.show(console, result)
    return asdict(result)
