"""`turboquant-jax bench`."""

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from turboquant_jax.cli import flags


def add(commands) -> None:
    """The flags."""
    bench = commands.add_parser(
        "bench",
        help="how fast decoding and prefill are, compressed beside full precision",
        description="Time decoding and prefill for every batch and context, with a dense cache in "
        "full precision and with compressed ones. For decoding the caches are filled, not "
        "prefilled, so that long contexts cost no time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.set_defaults(run=run)
    bench.add_argument("--model", help=f"{flags.MODEL} (default: SmolLM2-135M)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights")
    bench.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    bench.add_argument("--context", type=int, nargs="+", default=[1024], help="tokens of each")
    flags.add_preset(bench)
    flags.add_allocation(bench)
    bench.add_argument(
        "--bits",
        type=int,
        nargs="+",
        default=argparse.SUPPRESS,
        help="caches beside full precision (default: 4)",
    )
    bench.add_argument("--steps", type=int, default=64, help="steps of a timed loop")
    bench.add_argument("--repeats", type=int, default=3, help="timed loops; their median counts")
    bench.add_argument("--chunk", type=int, default=512, help="tokens of a pass of prefill")
    flags.add_segments(bench, window=128)
    bench.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw them, .svg, .png or .pdf")
    flags.add_json(bench)


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Measure and print."""
    import jax

    from turboquant_jax import bench
    from turboquant_jax.llama import load, timing

    for path in (arguments.csv, arguments.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder, expected one for {path.name}")
    if arguments.plot is not None:
        bench.require_plotting()
    widths = dict.fromkeys((bench.FULL, *getattr(arguments, "bits", [4])))
    caches: list[bench.Bits] = [(bits, bits) for bits in widths]
    code = flags.code(arguments)
    if arguments.preset is not None:
        flags.refuse_bits(arguments)
        caches = [caches[0], flags.preset_bits(arguments.preset)]
    if (allocation := flags.allocation(arguments)) is not None:
        layers, code = allocation
        caches = [caches[0], layers]
    grid = bench.Grid(
        caches, arguments.batch, arguments.context, arguments.steps, arguments.repeats,
        arguments.chunk, code=code, **flags.segments(arguments),
    )  # fmt: skip
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        task = bars.add_task("load the model", total=grid.size)

        def progress(what: str) -> None:
            bars.update(task, description=what)

        checkpoint = load(arguments.model, flags.dtype(arguments.dtype), stacked=False)
        bandwidth = timing.copy_bandwidth(2**30 if jax.default_backend() == "gpu" else 2**27)
        rows = []
        for row in bench.measure(checkpoint.model, grid, bandwidth, progress):
            rows.append(row)
            bars.update(task, advance=1)
    device = jax.devices()[0].device_kind
    _show(
        console, f"{checkpoint.name} on {device}, a copy runs at {bandwidth / 1e9:,.0f} GB/s", rows
    )
    if arguments.csv is not None:
        arguments.csv.write_text(bench.to_csv(rows))
    if arguments.plot is not None:
        bench.plot(rows, arguments.plot)
    return {
        "model": checkpoint.name,
        "device": device,
        "copy_bandwidth": bandwidth,
        "rows": [asdict(row) for row in rows],
    }


def _show(console: Console, title: str, rows: list) -> None:
    from turboquant_jax.bench import name

    table = Table(title=f"\n{title}", title_justify="left")
    for column in ("batch x\ncontext", "", "cache", "ms", "tokens/s", "ratio", "roof\nline", "MB"):
        table.add_column(column, justify="left" if column in ("", "cache") else "right")
    for row in rows:
        share = row.fraction_of_roofline
        table.add_row(
            f"{row.batch} x {row.context}", row.phase, name(row.bits_k, row.bits_v),
            f"{row.milliseconds:,.2f}", f"{row.tokens_per_second:,.1f}",
            f"{row.ratio:.2f}", "" if share is None else f"{share:.0%}",
            f"{row.cache_bytes / 1e6:,.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "16 bits: dense, full precision. ms: of a step, or of the whole prompt.\n"
        "ratio: of tokens/s to 16 bits. roofline: the time in which a copy moves as many\n"
        "bytes as weights and cache have, over the time of a step.",
        style="dim",
        highlight=False,
    )
