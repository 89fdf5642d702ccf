"""`turboquant-jax calibrate`."""

import argparse
import hashlib
from dataclasses import asdict
from importlib import resources

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from turboquant_jax.cli import settings, texts
from turboquant_jax.models import calibrate, load
from turboquant_jax.models.tokenizer import Tokenizer


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Calibrate and say what was found."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        task = bars.add_task("load the model", total=None)

        def progress(what: str, done: int, steps: int) -> None:
            bars.update(task, description=what, completed=done, total=steps)

        checkpoint = load(arguments.model, settings.dtype(arguments.dtype), stacked=False)
        plan = calibrate.Plan(
            settings.cache_config(
                checkpoint.config, 4, 4, code=arguments.code, scales="joint_products",
                scale_bits=arguments.scale_bits,
                **settings.segments(arguments, checkpoint.config.head_dim),
            ),
            **{name: getattr(arguments, name) for name in (
                "ratio", "kl", "capacity", "context", "windows", "alone", "seed", "tensor"
            )},
        )  # fmt: skip
        read = _texts(arguments, checkpoint.tokenizer)
        known = calibrate.calibrate(checkpoint, read, plan, arguments.out, progress)
    study = known.study
    assert study is not None
    keys, values = study.allocation.means
    console.print(
        f"{study.model}, {study.target}: keys {keys:.2f} and values {values:.2f} bits a channel, "
        f"{len(study.allocation.kinds)} formats.\nKL {study.predicted:.4f} nats a token as "
        f"predicted, {study.measured:.4f} on what did not choose. Written to {arguments.out}.",
        highlight=False,
    )
    facts = asdict(study)
    facts.pop("losses")
    return facts


def _texts(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[calibrate.Text]:
    """Those of the files; else the package's novel, and its own source of the models."""
    paths = getattr(arguments, "text", [])
    found = {str(path): texts.decode(path.read_bytes(), str(path)) for path in paths}
    if not found:
        package = resources.files("turboquant_jax")
        source = sorted(package.joinpath("models").iterdir(), key=lambda file: file.name)
        code = (file.read_text("utf-8") for file in source if file.name.endswith(".py"))
        found = {
            "persuasion": package.joinpath("texts/persuasion.txt").read_text("utf-8"),
            "turboquant_jax.models": "\n".join(code),
        }
    return [
        calibrate.Text(
            name, hashlib.sha256(text.encode()).hexdigest(), tuple(tokenizer.encode(text))
        )
        for name, text in found.items()
    ]
