"""The `turboquant-jax` command."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from turboquant_jax import rotation

TABLE_BITS = (8, 4, 3, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on stderr where the input is bad."""
    arguments = _parser().parse_args(argv)
    try:
        _check_output(arguments.json)
        result = arguments.run(arguments, Console(soft_wrap=False))
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        print(f"turboquant-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if arguments.json is not None:
        _write_json(arguments.json, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="turboquant-jax",
        description="TurboQuant: compress the KV cache of a language model, and attend to it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="a real model with a compressed cache: text, bytes, perplexity, theory",
        description="Generate with a full-precision and a compressed cache side by side, measure "
        "what each setting costs in bytes and in quality, and hold the quantizer against theory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--prompt", help="what to ask (default: a question about the text)")
    demo.add_argument("--bits", type=int, default=4, help="bits per channel of the answer's cache")
    demo.add_argument("--bits-k", type=int, help="bits of the keys, if not --bits")
    demo.add_argument("--bits-v", type=int, help="bits of the values, if not --bits")
    demo.add_argument("--window", type=int, default=64, help="newest tokens in full precision")
    demo.add_argument("--sinks", type=int, default=4, help="first tokens in full precision")
    demo.add_argument("--rotation", choices=get_args(rotation.Kind), default="hadamard")
    demo.add_argument("--seed", type=int, default=0, help="of rotations and samples")
    demo.add_argument("--tokens", type=int, default=64, help="most tokens of the answer")
    demo.add_argument("--context", type=int, default=768, help="tokens of the text to measure on")
    demo.add_argument(
        "--model", type=Path, help="GGUF file or Hugging Face folder (default: SmolLM2-135M)"
    )
    demo.add_argument("--text", type=Path, help="text to measure on (default: Austen, Persuasion)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    _add_plan(commands)
    return parser


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="how many tokens fit in a memory, in full precision and compressed",
        description="How many tokens of each sequence fit beside the weights, to the byte.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.set_defaults(run=_plan)
    plan.add_argument(
        "--model", required=True, help="preset such as llama-3-8b, config.json, folder or GGUF file"
    )
    plan.add_argument("--memory", required=True, help="24GB (10^9 bytes each) or 24GiB (2^30)")
    plan.add_argument("--batch", type=int, default=1, help="sequences of the same length")
    plan.add_argument("--bits", type=int, default=4, help="bits per channel of the cache")
    plan.add_argument("--bits-k", type=int, help="bits of the keys, if not --bits")
    plan.add_argument("--bits-v", type=int, help="bits of the values, if not --bits")
    plan.add_argument("--window", type=int, default=128, help="newest tokens in full precision")
    plan.add_argument("--sinks", type=int, default=4, help="first tokens in full precision")
    plan.add_argument("--rotation", choices=get_args(rotation.Kind), default="hadamard")
    plan.add_argument("--weight-bits", type=float, default=16, help="bits of a parameter")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def _plan(arguments: argparse.Namespace, console: Console) -> dict:
    from turboquant_jax import plan  # the help needs no JAX

    result = plan.plan(
        arguments.model,
        arguments.memory,
        arguments.batch,
        _with_table(_asked(arguments)),
        window=arguments.window,
        sinks=arguments.sinks,
        weight_bits=arguments.weight_bits,
        rotation=arguments.rotation,
    )
    plan.show(console, result)
    return asdict(result)


def _asked(arguments: argparse.Namespace) -> tuple[int, int]:
    key = arguments.bits if arguments.bits_k is None else arguments.bits_k
    return key, arguments.bits if arguments.bits_v is None else arguments.bits_v


def _with_table(asked: tuple[int, int]) -> list[tuple[int, int]]:
    """(key, value) bits of the rows of a table, most first."""
    return sorted({asked, *((b, b) for b in TABLE_BITS)}, key=sum, reverse=True)


def _demo(arguments: argparse.Namespace, console: Console) -> dict:
    from turboquant_jax import demo  # the help needs no JAX
    from turboquant_jax.llama import load

    for name in ("tokens", "context"):
        if getattr(arguments, name) < 2:
            raise ValueError(f"--{name} must be at least 2, got {getattr(arguments, name)}")
    if arguments.text is not None and not arguments.text.is_file():
        raise FileNotFoundError(f"{arguments.text}: no such file, expected a text")
    asked = _asked(arguments)
    pairs = _with_table(asked)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bars:
        task = bars.add_task("load the model", total=1 + 2 + 1 + len(pairs) + 8)

        def step(description: str):
            bars.update(task, advance=1, description=description)

        checkpoint = load(arguments.model)
        options = dict(rotation=arguments.rotation, window=arguments.window, sinks=arguments.sinks)
        configs = {pair: demo.cache_config(checkpoint.config, *pair, **options) for pair in pairs}
        tokens = demo.text_tokens(checkpoint, arguments.text, arguments.context)
        prompt = arguments.prompt or demo.default_prompt()
        answers = []
        exact = demo.full_precision(configs[asked], checkpoint.config.max_position)
        for name, config in (("full precision", exact), (_name(*asked), configs[asked])):
            step(f"answer: {name}")
            answers.append(
                demo.answer(checkpoint, config, prompt, arguments.tokens, arguments.seed, name)
            )
        step("read the text: full precision")
        fidelity = demo.Fidelity(checkpoint, tokens, arguments.seed)
        rows = [fidelity.full(configs[asked])]
        for pair, config in configs.items():
            step(f"read the text: {_name(*pair)}")
            rows.append(fidelity.row(config))
        theory = []
        for bits in range(1, 9):
            step(f"quantize uniform vectors at {bits} bits")
            theory.append(
                demo.theory_row(
                    bits, checkpoint.config.head_dim, arguments.rotation, arguments.seed
                )
            )
    _print_answers(console, checkpoint.name, prompt, answers)
    _print_fidelity(console, rows, tokens.shape[1], arguments)
    _print_theory(console, theory, checkpoint.config.head_dim, arguments.rotation)
    return {
        "model": checkpoint.name,
        "prompt": prompt,
        "answers": [asdict(answer) for answer in answers],
        "context": tokens.shape[1],
        "cache": rows,
        "theory": theory,
    }


def _name(key_bits: int, value_bits: int) -> str:
    return f"{key_bits} bits" if key_bits == value_bits else f"K {key_bits}, V {value_bits} bits"


def _print_answers(console: Console, model: str, prompt: str, answers: list) -> None:
    console.print(f"\n[bold]{model}[/] is asked: {prompt}\n", highlight=False)
    table = Table(show_lines=True)
    for column in ("cache", "tokens/s", "answer"):
        table.add_column(column)
    for answer in answers:
        table.add_row(answer.cache, f"{answer.tokens_per_second:.1f}", answer.text)
    console.print(table)


def _print_fidelity(console: Console, rows: list[dict], context: int, arguments) -> None:
    table = Table(
        box=SIMPLE_HEAD,
        title=f"\n{context:,} tokens of text; sinks {arguments.sinks}, window {arguments.window}, "
        f"keys centred,\n{arguments.rotation} rotation",
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
            str(row["bits_k"]), str(row["bits_v"]),
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


def _check_output(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, expected one for {path.name}")


def _write_json(path: Path, result: dict) -> None:
    """The whole file or none of it."""
    with NamedTemporaryFile("w", dir=path.resolve().parent, delete=False) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.exit(main())
