"""`turboquant-jax plan`."""

import argparse
from dataclasses import asdict

from rich.console import Console

from turboquant_jax.cli import flags


def add(commands) -> None:
    """The flags."""
    plan = commands.add_parser(
        "plan",
        help="how many tokens fit in a memory, in full precision and compressed",
        description="How many tokens of each sequence fit beside the weights, to the byte.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.set_defaults(run=run)
    plan.add_argument(
        "--model", required=True, help="preset such as llama-3-8b, config.json, folder or GGUF file"
    )
    plan.add_argument("--memory", required=True, help="24GB (10^9 bytes each) or 24GiB (2^30)")
    plan.add_argument("--batch", type=int, default=1, help="sequences of the same length")
    flags.add_cache(plan, window=128)
    plan.add_argument("--weight-bits", type=float, default=16, help="bits of a parameter")
    flags.add_json(plan)


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Plan and print."""
    from turboquant_jax import plan  # the help needs no JAX

    result = plan.plan(
        arguments.model,
        arguments.memory,
        arguments.batch,
        flags.with_table(flags.asked_bits(arguments)),
        weight_bits=arguments.weight_bits,
        **flags.segments(arguments),
    )
    plan.show(console, result)
    return asdict(result)
