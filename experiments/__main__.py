"""`python -m experiments list | run NAME [--flags] | report [--check]`."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import front
from experiments.catalogue import EXPERIMENTS
from experiments.harness import report, results
from experiments.harness.data import MissingDataError
from experiments.harness.experiment import GPU, Experiment, Row, keys_of, name_of, needs_of
from experiments.harness.results import OtherConfigurationError

REPORT = Path(__file__).parent.parent / "REPORT.md"
SMOKE_OUT = Path("build/experiments")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 (refused or out of date) or 2 (usage)."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except (MissingDataError, OtherConfigurationError, ValueError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("list", help="name every experiment").set_defaults(command=_list)

    run = commands.add_parser("run", help="run one experiment and keep its results")
    names = run.add_subparsers(required=True, metavar="NAME")
    for experiment in EXPERIMENTS:
        _add_run(names, experiment)

    add = commands.add_parser("add", help="put rows of runs elsewhere beside those held here")
    add.add_argument("folders", nargs="+", type=Path, help="what those runs wrote")
    add.add_argument("--out", type=Path, default=results.COMMITTED, help="folder of the results")
    add.set_defaults(command=_add)

    write = commands.add_parser("report", help="write REPORT.md and its pages from the results")
    write.add_argument("--check", action="store_true", help="only say whether it is up to date")
    write.add_argument("--redraw", action="store_true", help="draw every figure anew from its rows")
    write.add_argument("--out", type=Path, default=results.COMMITTED, help="folder of the results")
    write.add_argument("--file", type=Path, default=REPORT, help="where the report is")
    write.set_defaults(command=_report)
    return parser


def _add_run(names: Any, experiment: Experiment) -> None:
    title, _, text = (experiment.__doc__ or "").partition("\n")
    parser = names.add_parser(
        name_of(experiment),
        help=title.rstrip("."),
        description=title + text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(experiment.Config):
        _add_flag(parser, field)
    parser.add_argument("--smoke", action="store_true", help="the size that CI runs")
    parser.add_argument("--label", default="", help="suffix of the results folder, e.g. a device")
    parser.add_argument("--out", type=Path, help="folder of the results, instead of the committed")
    parser.add_argument("--force", action="store_true", help="replace another configuration's")
    parser.set_defaults(command=_run, experiment=experiment)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    default: Any = field.default
    several = isinstance(default, tuple)
    shown = " ".join(map(str, default)) if several else default
    name = f"--{field.name.replace('_', '-')}"
    if isinstance(default, bool):
        parser.add_argument(name, action="store_true", default=None, help=field.metadata["help"])
        return
    kind = type((default or ("",))[0] if several else default)
    parser.add_argument(
        name,
        type=kind,
        nargs="+" if several else None,
        choices=field.metadata["choices"],
        metavar=None if field.metadata["choices"] else kind.__name__.upper(),
        help=f"{field.metadata['help']} ({shown})" if shown != "" else field.metadata["help"],
    )


def _list(_: argparse.Namespace) -> int:
    room = ""
    for experiment in EXPERIMENTS:
        if (here := experiment.__name__.split(".")[-2]) != room:
            room = here
            print(f"{room}/")
        title = (experiment.__doc__ or "").partition("\n")[0]
        needs = f" Needs {needs_of(experiment)}." * bool(needs_of(experiment))
        print(f"  {name_of(experiment):20} {title}{needs}")
    return 0


def _configuration(args: argparse.Namespace) -> Any:
    """The configuration of `--smoke` or the full one, with the flags that were given."""
    base = args.experiment.SMOKE if args.smoke else args.experiment.Config()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(base)}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return dataclasses.replace(base, **changes)


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _run(args: argparse.Namespace) -> int:
    config = _configuration(args)
    out = args.out or (SMOKE_OUT if args.smoke else results.COMMITTED)
    experiment, name = args.experiment, name_of(args.experiment)
    folder = out / (f"{name}.{args.label}" if args.label else name)
    results.check_free(folder, results.config_of(config), args.force)

    if needs_of(experiment) == GPU and not _has_gpu():
        raise ValueError(f"{name}: got {jax.devices()[0].device_kind}, expected {GPU}")
    start, rows, is_new = time.monotonic(), list[Row](), not folder.exists()
    device = getattr(experiment, "device", results.device)()
    described = _command(args, config), results.config_of(config), device
    bars = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*bars, transient=True) as progress:
        show = progress.console.print
        found = experiment.run(config, lambda items, text: progress.track(items, description=text))
        if isinstance(found, list):
            rows = found
        else:
            for row in found:
                rows.append(row)
                show(results.line(row), highlight=False, markup=False, soft_wrap=True)
                if is_new:
                    seconds = time.monotonic() - start
                    meta = results.describe(*described, seconds) | {"unfinished": True}
                    results.write(folder, rows, meta, None)
    seconds = time.monotonic() - start
    meta = results.describe(*described, seconds)
    results.write(folder, rows, meta, report.draw(experiment, rows))
    for claim in experiment.claims(results.read(folder).rows):
        print(f"{claim.verdict:17} {claim.source}: {claim.statement} -> {claim.measured}")
    print(f"{len(rows)} rows in {seconds:.0f} s: {folder}")
    return 0


def _add(args: argparse.Namespace) -> int:
    """Rows with the same `KEYS` are replaced; the figure is drawn anew."""
    for folder in args.folders:
        experiment = next(e for e in EXPERIMENTS if name_of(e) == folder.name.partition(".")[0])
        held = results.read(args.out / folder.name)
        rows, meta = results.join(held, results.read(folder), keys_of(experiment))
        results.write(held.folder, rows, meta, report.draw(experiment, rows))
        print(f"{len(rows)} rows: {held.folder}")
    return 0


def _command(args: argparse.Namespace, config: Any) -> str:
    """The command that repeats this run, without paths."""
    base = args.experiment.SMOKE if args.smoke else args.experiment.Config()
    words = ["python -m experiments run", name_of(args.experiment)]
    for field in dataclasses.fields(base):
        value = getattr(config, field.name)
        if value != getattr(base, field.name):
            flat = value if isinstance(value, tuple) else (value,)
            flat = () if value is True else flat
            flat = (Path(value).name,) if field.metadata["path"] else flat
            words += [f"--{field.name.replace('_', '-')}", *map(str, flat)]
    words += ["--smoke"] * args.smoke + ["--label", args.label] * bool(args.label)
    return " ".join(words)


def _report(args: argparse.Namespace) -> int:
    committed = args.out == results.COMMITTED  # whose rows README shows
    if args.check:
        problems = report.check(EXPERIMENTS, args.out, args.file)
        problems += front.check(args.file.parent, args.out) if committed else []
        for problem in problems:
            print(problem, file=sys.stderr)
        return 1 if problems else 0
    report.draw_missing(EXPERIMENTS, args.out, args.redraw)
    report.write(EXPERIMENTS, args.out, args.file)
    if committed:
        front.write(args.file.parent, args.out)
        front.draw(args.file.parent, args.out, args.redraw)
    print(args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
