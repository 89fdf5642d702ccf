"""The command's subcommands and their flags. Nothing here needs more than the standard library."""

import argparse
from pathlib import Path

from turboquant_jax.cli import checks, choices, flags


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


class _Version(argparse.Action):
    """`--version`: of the package, of JAX and of Python, as a report of a fault needs them."""

    def __call__(self, parser, *_):
        import platform
        from importlib.metadata import version

        jax, python = version("jax"), platform.python_version()
        print(f"{parser.prog} {version('turboquant-jax')} (jax {jax}, Python {python})")
        parser.exit()


def build() -> argparse.ArgumentParser:
    """The whole command line; `arguments.check(arguments)` says what is wrong beyond syntax."""
    parser = argparse.ArgumentParser(
        prog="turboquant-jax",
        description="TurboQuant: compress the KV cache of a language model, and attend to it.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_demo, _generate, _chat, _bench, _plan, _calibrate):
        add(commands)
    return parser


def _demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="a real model with a compressed cache: text, bytes, perplexity, theory",
        description="Generate with a full-precision and a compressed cache side by side, measure "
        "what each setting costs in bytes and in quality, and hold the quantizer against theory.",
        formatter_class=_Formatter,
    )
    demo.set_defaults(check=checks.demo)
    demo.add_argument("--prompt", help="what to ask (default: a question about the text)")
    flags.add_cache(demo, window=64)
    flags.add_calibration(demo)
    demo.add_argument("--seed", type=int, default=0, help="of rotations and samples")
    demo.add_argument("--tokens", type=int, default=64, help="most tokens of the answer")
    demo.add_argument("--context", type=int, default=768, help="tokens of the text to measure on")
    flags.add_model(demo)
    demo.add_argument("--text", type=Path, help="text to measure on (default: Austen, Persuasion)")
    flags.add_compile_cache(demo)
    flags.add_json(demo)


def _generate(commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="text from one prompt or many, with a compressed cache",
        description="Answer a prompt, or every line of a file as one batch. Row i draws its tokens "
        "with seed + i, so that it is the same alone. --bits 16 is a dense, exact cache.",
        formatter_class=_Formatter,
    )
    generate.set_defaults(check=checks.generate)
    generate.add_argument("prompt", nargs="?", help="what to answer; - reads standard input")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, one batch")
    generate.add_argument(
        "--messages", type=Path, metavar="FILE", help='JSON: [{"role": ..., "content": ...}, ...]'
    )
    generate.add_argument(
        "--plain", action="store_true", help="no chat template: continue the text"
    )
    _add_answers(generate)
    generate.add_argument("--stream", action="store_true", help="print the text as it is made")
    generate.add_argument(
        "--save-cache", type=Path, metavar="FILE", help="keep the cache of the prompt here"
    )
    generate.add_argument(
        "--load-cache", type=Path, metavar="FILE", help="begin with this one's tokens, read before"
    )
    generate.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="answers to one prompt, which is kept and read once; answer i is that of seed + i",
    )
    flags.add_mesh(generate)
    flags.add_speculation(generate)
    flags.add_allocation(generate)
    flags.add_calibration(generate)
    flags.add_json(generate)


def _chat(commands) -> None:
    chat = commands.add_parser(
        "chat",
        help="a conversation, whose cache is kept over the turns",
        description="Answer line by line, until the end of the input (Ctrl-D). Each turn reads "
        "only what is new. Ctrl-C ends an answer. --bits 16 is a dense, exact cache.",
        formatter_class=_Formatter,
    )
    chat.set_defaults(check=checks.chat)
    _add_answers(chat)
    flags.add_allocation(chat)
    flags.add_calibration(chat)
    flags.add_json(chat)


def _add_answers(parser: argparse.ArgumentParser) -> None:
    """The model, how it is asked, and how its tokens are drawn."""
    flags.add_model(parser)
    flags.add_dtype(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system's message, before all others")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    parser.add_argument(
        "--capacity", type=int, help="tokens there is room for (default: what is needed)"
    )
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a pass over the prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="draw from the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="draw from the smallest set this probable")
    parser.add_argument("--seed", type=int, default=0, help="of samples and rotations")
    parser.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="end an answer before this; may be given several times",
    )
    flags.add_cache(parser, window=128)
    flags.add_compile_cache(parser)


def _bench(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="how fast decoding and prefill are, compressed beside full precision",
        description="Time decoding and prefill for every batch and context, with a dense cache in "
        "full precision and with compressed ones. For decoding the caches are filled, not "
        "prefilled, so that long contexts cost no time.",
        formatter_class=_Formatter,
    )
    bench.set_defaults(check=checks.bench)
    flags.add_model(bench)
    flags.add_dtype(bench)
    flags.add_mesh(bench)
    bench.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    bench.add_argument("--context", type=int, nargs="+", default=[1024], help="tokens of each")
    flags.add_preset(bench)
    flags.add_allocation(bench)
    flags.add_calibration(bench)
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
    flags.add_compile_cache(bench)
    flags.add_json(bench)


def _plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="how many tokens fit in a memory, in full precision and compressed",
        description="How many tokens of each sequence fit beside the weights, to the byte.",
        formatter_class=_Formatter,
    )
    plan.set_defaults(check=checks.plan)
    plan.add_argument(
        "--model", required=True, help="preset such as llama-3-8b, config.json, folder or GGUF file"
    )
    plan.add_argument("--memory", required=True, help="24GB (10^9 bytes each) or 24GiB (2^30)")
    plan.add_argument("--batch", type=int, default=1, help="sequences of the same length")
    flags.add_mesh(plan)
    flags.add_cache(plan, window=128)
    flags.add_calibration(plan)
    plan.add_argument("--weight-bits", type=float, default=16, help="bits of a parameter")
    flags.add_json(plan)


def _calibrate(commands) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="find the format of every head that loses least at a size",
        description="Read texts, measure what every format of every head would lose, and choose. "
        "What was gathered is kept beside FILE: the same command goes on where one stopped.",
        formatter_class=_Formatter,
    )
    calibrate.set_defaults(check=checks.calibrate)
    calibrate.add_argument("model", nargs="?", help=f"{flags.MODEL} (default: SmolLM2-135M)")
    target = calibrate.add_mutually_exclusive_group(required=True)
    target.add_argument("--ratio", type=float, help="times smaller than in full precision")
    target.add_argument("--kl", type=float, help="most KL divergence, in nats a token")
    calibrate.add_argument("--out", type=Path, metavar="FILE", required=True)
    calibrate.add_argument(
        "--text",
        type=Path,
        action="append",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="what to read; may be given several times (default: a novel, and Python)",
    )
    calibrate.add_argument(
        "--capacity", type=int, default=65_536, help="tokens of the cache whose bytes count"
    )
    calibrate.add_argument("--context", type=int, default=512, help="tokens of a window of text")
    calibrate.add_argument("--windows", type=int, default=16, help="most windows that are read")
    calibrate.add_argument(
        "--alone", type=int, default=1, help="windows on which each layer is compressed alone"
    )
    calibrate.add_argument(
        "--scale-bits", type=int, choices=(8, 16), default=16, help="of the scale of a vector"
    )
    calibrate.add_argument(
        "--code", choices=("trellis", "scalar"), default="trellis", help="of keys and values: "
        "scalar codes lose more and are attended to faster"
    )  # fmt: skip
    calibrate.add_argument("--seed", type=int, default=0, help="of rotations and drawn texts")
    calibrate.add_argument(
        "--tensor", type=int, default=1, help="devices of --mesh tensor= that will share the heads"
    )
    calibrate.set_defaults(preset=None)
    flags.add_segments(calibrate, window=128)
    calibrate.add_argument(
        "--dtype",
        default="float32",
        help=f"of weights: {' or '.join(choices.DTYPES)}; what a format loses is less than what "
        "bfloat16 rounds",
    )
    flags.add_compile_cache(calibrate)
    flags.add_json(calibrate)
