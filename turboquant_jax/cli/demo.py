"""`turboquant-jax demo`."""

import argparse
from dataclasses import asdict, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from turboquant_jax.cli import demonstration, settings
from turboquant_jax.models import load


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Measure and print."""
    asked = settings.asked_bits(arguments)
    text = demonstration.read_text(arguments.text)
    pairs = {} if arguments.calibration is not None else settings.table(arguments)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bars:
        task = bars.add_task("load the model", total=1 + 2 + 1 + max(1, len(pairs)) + 8)

        def step(description: str):
            bars.update(task, advance=1, description=description)

        checkpoint = load(arguments.model, stacked=arguments.calibration is None)
        segments = settings.segments(arguments, checkpoint.config.head_dim)
        kinds = {
            pair: settings.Kind(
                settings.name_of_bits(*pair),
                settings.cache_config(checkpoint.config, *pair, code=code, **segments),
            )
            for pair, code in pairs.items()
        }
        found = settings.calibrated(arguments, checkpoint.config, checkpoint.model)
        if found is not None:
            kinds = {asked: found}
        tokens = demonstration.text_tokens(checkpoint, text, arguments.context)
        prompt = arguments.prompt or demonstration.default_prompt()
        answers = []
        exact = demonstration.full_precision(kinds[asked].config, checkpoint.config.max_position)
        for kind in (replace(kinds[asked], name="full precision", config=exact), kinds[asked]):
            step(f"answer: {kind.name}")
            answers.append(
                demonstration.answer(checkpoint, kind, prompt, arguments.tokens, arguments.seed)
            )
        step("read the text: full precision")
        fidelity = demonstration.Fidelity(checkpoint, tokens, arguments.seed)
        rows = [fidelity.full(kinds[asked])]
        for kind in kinds.values():
            step(f"read the text: {kind.name}")
            rows.append(fidelity.row(kind))
        theory = []
        for bits in range(1, 9):
            step(f"quantize uniform vectors at {bits} bits")
            theory.append(
                demonstration.theory_row(
                    bits, checkpoint.config.head_dim, segments["rotation"], arguments.seed
                )
            )
    _print_answers(console, checkpoint.name, prompt, answers)
    _print_fidelity(console, rows, tokens.shape[1], segments)
    _print_theory(console, theory, checkpoint.config.head_dim, segments["rotation"])
    return {
        "model": checkpoint.name,
        "prompt": prompt,
        "answers": [asdict(answer) for answer in answers],
        "context": tokens.shape[1],
        "cache": rows,
        "theory": theory,
    }


def _print_answers(console: Console, model: str, prompt: str, answers: list) -> None:
    console.print(f"\n[bold]{model}[/] is asked: {prompt}\n", highlight=False)
    table = Table(show_lines=True)
    for column in ("cache", "tokens/s", "answer"):
        table.add_column(column)
    for answer in answers:
        table.add_row(answer.cache, f"{answer.tokens_per_second:.1f}", answer.text)
    console.print(table)


def _print_fidelity(console: Console, rows: list[dict], context: int, segments: dict) -> None:
    table = Table(
        box=SIMPLE_HEAD,
        title=f"\n{context:,} tokens of text; sinks {segments['sinks']}, "
        f"window {segments['window']}, keys centred,\n{segments['rotation']} rotation",
        title_justify="left",
    )
    columns = (
        "K\nbits", "V\nbits", "bytes a\ntoken", "ratio", "long:\nbytes", "\nratio",
        "per-\nplexity", "KL,\nnats", "same\ntop 1",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            _bits(row["bits_k"]), _bits(row["bits_v"]),
            f"{row['bytes_per_token']:,.0f}", f"{row['ratio']:.2f}",
            f"{row['bytes_per_token_long']:,.0f}", f"{row['ratio_long']:.2f}",
            f"{row['perplexity']:.3f}", f"{row['kl']:.5f}", f"{row['top1_agreement']:.2%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "bytes a token: every array of the cache over its tokens; long: of each further token.\n"
        "Full precision is the dequantized checkpoint with a cache of bfloat16.",
        style="dim",
    )


def _bits(bits: float | str) -> str:
    return bits if isinstance(bits, str) else f"{bits:.3g}"


def _print_theory(console: Console, rows: list[dict], dim: int, rotation_kind: str) -> None:
    table = Table(
        box=SIMPLE_HEAD,
        title=f"\nRelative MSE on uniform unit vectors, d = {dim}, {rotation_kind} rotation",
        title_justify="left",
    )
    columns = (
        "bits", "measured", "± s.e.", "exact\nLloyd-Max", "paper's\nbound", "rate-\ndistortion",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["bits"]), *(
                f"{row[name]:.3e}"
                for name in (
                    "measured", "standard_error", "lloyd_max", "upper_bound", "rate_distortion"
                )
            ),
        )  # fmt: skip
    console.print(table)
