"""`turboquant-jax bench`."""

import argparse
from dataclasses import asdict, replace

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from turboquant_jax.cli import grid, settings
from turboquant_jax.models import load, timing


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Measure and print."""
    settings.join_hosts(arguments)
    if arguments.plot is not None:
        grid.require_plotting()
    widths = dict.fromkeys((grid.FULL, *getattr(arguments, "bits", [4])))
    caches: list[grid.Bits] = [(bits, bits) for bits in widths]
    code = settings.code(arguments)
    if arguments.preset is not None:
        caches = [caches[0], settings.preset_bits(arguments.preset)]
    if (allocation := settings.allocation(arguments.allocation)) is not None:
        layers, code = allocation
        caches = [caches[0], layers]
    sizes = arguments.batch, arguments.context, arguments.steps, arguments.repeats, arguments.chunk
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        task = bars.add_task("load the model", total=None)

        def progress(what: str) -> None:
            bars.update(task, description=what)

        mesh = settings.mesh(arguments)
        checkpoint = load(
            arguments.model, settings.dtype(arguments.dtype), stacked=False, mesh=mesh
        )
        segments = settings.segments(arguments, checkpoint.config.head_dim)
        kind = settings.calibrated(arguments, checkpoint.config, checkpoint.model)
        if kind is not None and kind.config.allocation is not None:
            caches, code = [caches[0], kind.config.allocation], kind.config.key.code
        asked = grid.Grid(caches, *sizes, code=code, mesh=mesh, **segments)
        if kind is not None:
            scales = kind.config.key.scales
            asked = replace(asked, scales=scales, calibration=kind.calibration)
        bars.update(task, total=asked.size)
        bandwidth = timing.copy_bandwidth(2**30 if jax.default_backend() == "gpu" else 2**27)
        rows = []
        for row in grid.measure(checkpoint.model, asked, bandwidth, progress):
            rows.append(row)
            bars.update(task, advance=1)
    device = jax.devices()[0].device_kind
    many = "" if mesh is None else f"{mesh.size} x "
    title = f"{checkpoint.name} on {many}{device}, a copy runs at {bandwidth / 1e9:,.0f} GB/s"
    if segments["rotation"] != "hadamard":
        title += f", {segments['rotation']} rotation"
    _show(console, title, rows)
    if arguments.csv is not None:
        arguments.csv.write_text(grid.to_csv(rows))
    if arguments.plot is not None:
        grid.plot(rows, arguments.plot)
    return {
        "model": checkpoint.name,
        "device": device,
        "mesh": None if mesh is None else dict(mesh.shape),
        "copy_bandwidth": bandwidth,
        "rotation": segments["rotation"],
        "rows": [asdict(row) for row in rows],
    }


def _show(console: Console, title: str, rows: list) -> None:
    table = Table(title=f"\n{title}", title_justify="left")
    for column in ("batch x\ncontext", "", "cache", "ms", "tokens/s", "ratio", "roof\nline", "MB"):
        table.add_column(column, justify="left" if column in ("", "cache") else "right")
    for row in rows:
        share = row.fraction_of_roofline
        table.add_row(
            f"{row.batch} x {row.context}", row.phase, grid.name(row.bits_k, row.bits_v),
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
