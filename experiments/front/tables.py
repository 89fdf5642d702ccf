"""Tables of README.md and of the page of what was measured, from committed rows."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.harness import results
from experiments.harness.experiment import Row, distinct, where
from experiments.speed.llama_figure import limit_of

SMALL, BIASED = "smollm2-135m", "qwen2.5-coder-0.5b"
PRESETS = {
    "lossless": "K4 V4 trellis w128",
    "balanced": "K3 V3 trellis w128",
    "compact": "K3 V2 trellis w128",
    "max": "K2 V2 trellis w128",
}
CALIBRATED = f"{SMALL}-six"
"""The file that stands for calibrations, of those of SmolLM2."""
PEERS = {
    "KIVI int4": "KIVI, int4",
    "KIVI int2": "KIVI, int2",
    "vLLM 4bit_nc, every layer": "vLLM, 4bit_nc in every layer",
    "vLLM 3bit_nc, every layer": "vLLM, 3bit_nc in every layer",
    "per-token int4": "per token, int4",
    "per-token int2": "per token, int2",
    "fp8": "fp8",
}
SHAPES = ((32, 4096), (8, 32768), (1, 131072), (1, 8192))
DECODERS = ("32x4096", "8x32768", "1x4096", "largest4096")
STORED = "llama_speed.stored"
"""The decoder with the mean of stored keys; `llama_speed` has that before RoPE, of 4 bits alone."""


def rows_of(name: str, out: Path) -> list[Row]:
    """The rows of a results folder."""
    return results.read(out / name).rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def one(rows: Sequence[Row], **wanted) -> Row:
    """The one row that has these values."""
    found = where(rows, **wanted)
    if len(found) != 1:
        raise ValueError(f"rows with {wanted}: got {len(found)}, expected 1")
    return found[0]


def centred(rows: Sequence[Row], model: str, setting: str, mean: str = " pre-RoPE") -> Row:
    """What a setting loses over all test texts, its keys centred by this mean."""
    return one(rows, kind="centring", model=model, text="all", preset=setting + mean)


def _percent(row: Row) -> str:
    change, error = 100 * row["perplexity_change"], 100 * row["perplexity_change_se"]
    if change > 1000:
        return f"{1 + change / 100:.0f} ± {error / 100:.0f} times"
    digits = 2 if abs(change) < 10 else 1
    return f"{change:+.{digits}f} ± {error:.{digits}f} %"


def _headline(out: Path) -> Iterator[str]:
    """What it is worth, in three lines."""
    loss, speed = rows_of("fidelity", out), rows_of("decode_speed", out)
    first, last = (centred(loss, SMALL, PRESETS[name]) for name in ("lossless", "max"))
    times = [_speed(speed, shape, bits) for shape in SHAPES[:3] for bits in (4, 2)]
    times += [t for shape in SHAPES[:3] if (t := _with_mean(out, shape)) is not None]
    mean = _decoder(rows_of("llama_speed", out), "8x32768", 4)
    whole = mean, _decoder(rows_of(STORED, out), "8x32768", 2)
    yield (
        f"- **{first['ratio']:.1f} to {last['ratio']:.1f} times smaller** at 8,192 tokens, every "
        f"byte counted, for {100 * first['perplexity_change']:.1f} to "
        f"{100 * last['perplexity_change']:.1f} % of perplexity (SmolLM2-135M)."
    )
    yield (
        f"- **{min(times):.1f} to {max(times):.1f} times faster** decode attention than cuDNN over "
        f"bfloat16 on an H100; a whole 8B decoder {whole[0]:.2f} to {whole[1]:.2f} times "
        "(8 sequences of 32,768 tokens)."
    )


def _presets(out: Path) -> Iterator[str]:
    rows = rows_of("fidelity", out)
    lines = []
    for name, setting in PRESETS.items():
        small, biased = (centred(rows, model, setting) for model in (SMALL, BIASED))
        lines.append(
            [
                f"`{name}`",
                f"{small['bits_k']}, {small['bits_v']}",
                *(f"{small[ratio]:.2f}x" for ratio in ("ratio", "ratio_64k")),
                *(f"{small['kl']:.4f}", _percent(small), f"{biased['kl']:.4f}"),
            ]
        )
    for name in ("KIVI int2", "vLLM 3bit_nc, every layer", "per-token int4", "fp8"):
        row = one(rows, kind="peer", model=SMALL, text="all", preset=name)
        sizes = (f"{row[ratio]:.2f}x" for ratio in ("ratio", "ratio_64k"))
        bits = {"fp8": "8, 8"}.get(name, f"{name[-1]}, {name[-1]}" if "int" in name else "3, 3")
        lines.append([f"*{PEERS[name]}*", bits, *sizes, f"{row['kl']:.4f}", _percent(row), ""])
    head = ["", "bits of keys, values", "smaller at 8K", "at 64K"]
    yield from _table([*head, "KL, SmolLM2", "perplexity", "KL, Qwen2.5"], lines)


def _needles(out: Path) -> Iterator[str]:
    """How many needles are found of those that full precision finds."""
    rows = where(rows_of("needle", out), task="single", model=None)  # of the first run
    kept = [
        sum(row["kept"] for row in where(rows, preset=preset))
        for preset in (
            "lossless (K4 V4 w128)",
            "balanced (K3 V3 trellis w128)",
            "max (K2 V2 trellis w128)",
            "KIVI int2",
        )
    ]
    found = sum(row["found_full"] for row in where(rows, preset="full precision"))
    yield (
        f"Perplexity flatters: of {found} needles in 1,024 to 8,192 tokens that full "
        f"precision finds, 4 scalar bits keep {kept[0]}, `balanced` {kept[1]}, `max` {kept[2]}, "
        f"KIVI's int2 {kept[3]} (keys centred as stored)."
    )


def _around(out: Path) -> Iterator[str]:
    """What surrounds the decode kernel, and prompts."""
    step = one(rows_of("step_speed", out), part="step", batch=8)
    centred_step = one(rows_of("step_speed.mean", out), part="step", mean="pre_rope")
    centred_prompt = one(rows_of("prefill_speed.mean", out), bits=4, mean="pre_rope")
    prompts = where(rows_of("prefill_speed", out), bits=4)
    whole = one(prompts, setting="whole: compressed", tokens=32768)
    chunked = one(prompts, setting="chunked: compressed", tokens=131072)
    yield (
        "- A whole step of a layer at 4 bits (rotations, sinks, window, the new token) takes "
        f"{step['ratio_to_blocks']:.2f} times the kernel at 8 x 32,768; with the mean before RoPE "
        f"{centred_step['ratio_to_blocks']:.2f} times."
    )
    yield (
        f"- A prompt of 32,768 tokens, compressed, takes {whole['ratio_to_cudnn']:.2f} times the "
        "attention of cuDNN alone; with the mean before RoPE "
        f"{centred_prompt['ratio_to_cudnn']:.2f} times."
    )
    yield (
        f"- One of 131,072 tokens in chunks of 8,192 takes {chunked['ratio_to_cudnn']:.2f} times "
        f"that over a bfloat16 past, in {chunked['peak_ratio']:.2f} times the memory of cache and "
        "chunk."
    )


def _speed(rows: Sequence[Row], shape: tuple[int, int], bits: int, code: str = "pallas") -> float:
    batch, tokens = shape
    wanted = dict(batch=batch, tokens=tokens, bits_k=bits, bits_v=bits)
    return where(rows, implementation=code, **wanted)[0]["speedup_over_cudnn"]


def _with_mean(out: Path, shape: tuple[int, int]) -> float | None:
    """4 bits with the mean before RoPE; None where it was not timed."""
    batch, tokens = shape
    wanted = dict(batch=batch, tokens=tokens, mean="pre_rope", queries=4)
    found = where(rows_of("decode_speed.mean", out), **wanted)
    return found[0]["speedup_over_cudnn"] if found else None


def _decoder(rows: Sequence[Row], case: str, bits: int) -> float | None:
    found = where(rows, case=case, bits_k=bits)
    return found[0]["ratio_to_baseline"] if found else None


def _speeds(out: Path) -> Iterator[str]:
    attention, decoder = rows_of("decode_speed", out), rows_of(STORED, out)
    lines = []
    for batch, tokens in SHAPES:
        mean = _with_mean(out, (batch, tokens))
        default = "" if mean is None else f"{mean:.2f}x"
        four, three, two = (f"{_speed(attention, (batch, tokens), b):.2f}x" for b in (4, 3, 2))
        lines.append([f"attention, {batch} x {tokens:,}", four, default, three, two])
    for case, name in zip(DECODERS, ("32 x 4,096", "8 x 32,768", "1 x 4,096"), strict=False):
        four, three, two = (f"{_decoder(decoder, case, b):.2f}x" for b in (4, 3, 2))
        mean = _decoder(rows_of("llama_speed", out), case, 4)
        default = "" if mean is None else f"{mean:.2f}x"
        lines.append([f"8B decoder, {name}", four, default, three, two])
    base, *fitting = (one(decoder, case="largest4096", bits_k=b) for b in (16, 4, 2))
    most, more = (f"{r['ratio_to_baseline']:.2f}x ({r['batch']})" for r in fitting)
    lines.append([f"8B decoder, as many as fit ({base['batch']}) x 4,096", most, "", "", more])
    head = ["sequences x tokens", "4 bits", "4 bits, keys centred", "3 bits", "2 bits"]
    yield from _table(head, lines)


def _means(out: Path) -> Iterator[str]:
    """Both means on the three models."""
    rows = rows_of("fidelity", out)
    lines = []
    for setting in (*PRESETS.values(), "K4 V4 w128"):
        cells = []
        for model in (SMALL, BIASED, "qwen2.5-coder-1.5b"):
            old = centred(rows, model, setting, "")
            new = centred(rows, model, setting)
            cells.append(f"{new['kl']:.4f}, {_percent(new)} [{old['kl']:.4f}, {_percent(old)}]")
        words = f"{new['bits_k']}, {new['bits_v']}, {new['code']}"
        lines.append([words, *cells])
    bare = [
        centred(rows, model, PRESETS["lossless"], " uncentred")
        for model in (SMALL, BIASED, "qwen2.5-coder-1.5b")
    ]
    bare_cells = [f"{row['kl']:.4f}, {_percent(row)}" for row in bare]
    lines.append(["4, 4, trellis, not centred", *bare_cells])
    models = ("SmolLM2-135M, 8,192", "Qwen2.5-Coder-0.5B, 4,096", "Qwen2.5-Coder-1.5B, 4,096")
    yield from _table(["bits of keys, values, code", *models], lines)


def _peers(out: Path) -> Iterator[str]:
    rows = where(rows_of("fidelity", out), kind="peer", text="all")
    lines = []
    for row in where(rows, model=SMALL):
        biased = where(rows, model=BIASED, preset=row["preset"])
        cells = [f"{biased[0]['kl']:.4f}", _percent(biased[0])] if biased else ["", ""]
        sizes = (f"{row[ratio]:.2f}x" for ratio in ("ratio", "ratio_64k"))
        lines.append([row["preset"], *sizes, f"{row['kl']:.4f}", _percent(row), *cells])
    head = ["", "smaller at 8K", "at 64K", "KL, SmolLM2", "perplexity", "KL, Qwen2.5", "perplexity"]
    yield from _table(head, lines)


def _calibrated(out: Path) -> Iterator[str]:
    """Every preset with bits that are the same everywhere, and beside a calibration."""
    every = rows_of("fidelity", out)
    losses = where(every, kind="calibrated", text="all")
    needles = where(rows_of("needle", out), task="single")
    answers = rows_of("greedy", out)
    full = "full precision"
    lines = [[full, *[""] * 5, _kept(where(needles, model=SMALL), full), _beginning(answers, full)]]
    shown = [(f"`{name}`", f"{setting} pre-RoPE") for name, setting in PRESETS.items()]
    shown += [(f"`{name}`, calibrated", f"{name} by {CALIBRATED}") for name in PRESETS]
    shown.append(("the same, a window of 128", f"max by {SMALL} w128"))
    for words, preset in shown:
        row = one(losses, model=SMALL, preset=preset)
        sizes = (f"{row[ratio]:.2f}x" for ratio in ("ratio", "ratio_64k"))
        own = preset.replace(f" by {CALIBRATED}", f" by {BIASED}")
        kind = "centring" if own == preset else "calibrated"
        other = where(every, kind=kind, model=BIASED, text="all", context=4096, preset=own)
        cells = [f"{row['kl']:.4f}", _percent(row), *(f"{one['kl']:.4f}" for one in other)]
        cells += [""] * (not other)
        kept = _kept(where(needles, model=SMALL), preset)
        lines.append([words, *sizes, *cells, kept, _beginning(answers, preset)])
    head = ["", "smaller at 8K", "at 64K", "KL, SmolLM2", "perplexity", "KL, Qwen2.5"]
    yield from _table([*head, "needles", "equal tokens"], lines)


def _kept(rows: Sequence[Row], preset: str) -> str:
    """Needles found of those that full precision finds; the lengths where not all were asked."""
    found = where(rows, preset=preset)
    kept, of = (sum(row[column] for row in found) for column in ("kept", "found_full"))
    asked = sorted(distinct(found, "context"))
    lengths = (
        ""
        if asked == sorted(distinct(rows, "context"))
        else (f" ({', '.join(f'{length // 1024}K' for length in asked)})")
    )
    return f"{kept} of {of}{lengths}"


def _beginning(rows: Sequence[Row], preset: str) -> str:
    """Tokens of a greedy answer before the first that is not that of full precision, on average."""
    found = where(rows, preset=preset)
    count = sum(row["answers"] for row in found)
    equal, tokens = (
        sum(row[column] * row["answers"] for row in found) / count
        for column in ("prefix", "tokens")
    )
    return f"{equal:.0f} of {tokens:.0f}"


def _allocated(out: Path) -> Iterator[str]:
    """Bits of each layer, or head, beside the same bits everywhere."""
    rows = rows_of("layer_ablation.pre_rope", out)
    ways = {"uniform": "the same everywhere", "mixed": "by layer", "by head": "by head"}
    lines = []
    for name, setting in list(PRESETS.items())[1:]:
        for way, words in ways.items():
            row = one(rows, preset=f"{way} {setting} pre-RoPE")
            sizes = (f"{row[ratio]:.2f}x" for ratio in ("ratio", "ratio_64k"))
            lines.append([f"`{name}`, bits {words}", *sizes, f"{row['kl']:.4f}", _percent(row)])
    row = one(rows, preset="by head 114 bits scale8 w128 block16 pre-RoPE")
    sizes = (f"{row[ratio]:.2f}x" for ratio in ("ratio", "ratio_64k"))
    words = "bits by head, scales of 8 bits, blocks of 16"
    lines.append([words, *sizes, f"{row['kl']:.4f}", _percent(row)])
    yield from _table(["bytes of", "smaller at 8K", "at 64K", "KL", "perplexity"], lines)


def _longest(out: Path) -> Iterator[str]:
    rows = where(rows_of(STORED, out), case="longest")
    limits = sorted({row["memory_limit"] for row in rows})
    lines = []
    for limit in limits:
        found = [one(rows, memory_limit=limit, bits_k=bits)["context"] for bits in (16, 4, 2)]
        lines.append([f"{limit / 1e9:.1f} GB", *(f"{tokens:,}" for tokens in found)])
    yield from _table(["longest sequence", "bfloat16", "4 bits", "2 bits"], lines)


def _allowed(out: Path) -> Iterator[str]:
    """A whole decoder beside what reading weights and cache once would give."""
    centred, stored = rows_of("llama_speed", out), rows_of(STORED, out)
    lines = []
    for case, (rows, words) in itertools.product(
        DECODERS, ((centred, ", mean before RoPE"), (stored, ""))
    ):
        for row in where(rows, case=case):
            if row["bits_k"] == 16:
                continue
            cells = f"{row['batch']} x {row['context']:,}", f"{row['bits_k']} bits{words}"
            limit = limit_of(row, one(rows, case=case, bits_k=16))
            lines.append([*cells, f"{row['ratio_to_baseline']:.2f}x", f"{limit:.2f}x"])
    yield from _table(["sequences x tokens", "cache", "tokens a second", "allowed"], lines)


TABLES: dict[str, Callable[[Path], Iterator[str]]] = {
    "headline": _headline,
    "presets": _presets,
    "needles": _needles,
    "speed": _speeds,
    "around": _around,
    "means": _means,
    "peers": _peers,
    "calibrated": _calibrated,
    "allocated": _allocated,
    "decoder": _allowed,
    "longest": _longest,
}
