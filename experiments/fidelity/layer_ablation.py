"""Which layers, heads, and which of keys and values carry the loss.

One layer's keys, or values, or those of one of its heads are compressed (trellis code, four sinks,
centred keys), everything else stays in full precision: the KL divergence is that part's share.
From these, under the assumption that shares add up, bits from 1 to 4 are given to the keys and
values of every layer so that the sum is least at the bytes of a uniform cache (dynamic
programming), and the mixed cache is judged on the test texts beside the uniform one. `by head`
gives bits to every head, whose shares at other bits are taken in proportion to those at 2. The
library has a cache with bits of every layer (`cache.mixed`), none with bits of every head; the
bytes are those of the uniform one. `pre-RoPE` keys are centred by the
mean of the keys before their rotary embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from experiments.fidelity import losses
from experiments.fidelity.allocation import Mixed, One, shared_by_heads
from experiments.fidelity.choices import pre_rope
from experiments.fidelity.codecs import Mean
from experiments.fidelity.forcing import Forcing, cut
from experiments.fidelity.judgement import LENGTHS, TARGETS
from experiments.fidelity.losses import Subject
from experiments.fidelity.rule import Rule
from experiments.fidelity.settings import Setting, turbo
from experiments.harness import prepared
from experiments.harness.experiment import Claim, Row, Track, distinct, option, where
from experiments.harness.journal import Journal, open_journal
from experiments.harness.plotting import Figure, label, panels
from experiments.harness.statistics import is_below, is_less, of_aim
from turboquant_jax.cache import allocate

NEEDS = prepared.NEEDS


@dataclass(frozen=True)
class Config:
    """What to run."""

    model: str = option("smollm2-135m", "smollm2-135m, or tiny: random weights")
    context: int = option(8192, "tokens of a calibration text")
    rows: int = option(1, "calibration texts of each name")
    test_context: int = option(8192, "tokens of a test text")
    test_rows: int = option(0, "test texts of each name, 0 for all")
    bits: tuple[int, ...] = option(
        (2, 1, 3, 4), "bits that a part may get; shares are of the first"
    )
    uniform: tuple[str, ...] = option(
        ("2 2", "3 2", "3 3"), "bits of keys and values to compare with"
    )
    short: tuple[str, ...] = option(
        ("146 128 16", "114 128 16", "178 128 16", "107 192 16", "127 128 16"),
        "bits of all parts, window and block of more mixed caches, their scales in 8 bits",
    )
    window: int = option(128, "newest tokens in full precision")
    pre_rope: int = option(0, "whether keys are centred before their rotary embedding, 0 or 1")
    heads: int = option(1, "whether heads are measured too, 0 or 1")
    seeds: int = option(3, "draws of the rotations")
    precision: str = option("highest", "of float32 products, see jax.default_matmul_precision")
    seconds: float = option(0.0, "stop starting new cases after so long, 0 for never")


SMOKE = Config("tiny", 160, 4, 160, 4, (2, 1), ("2 1",), ("6 64 16",), 64, 0, 1, 2)


def run(config: Config, track: Track) -> list[Row]:
    """The parts one by one, then the mixed caches that follow, then the heads."""
    journal = open_journal("layer_ablation", config)
    forcing = cut(prepared.model(config.model), config.precision)
    layers, heads = forcing.model.config.num_layers, forcing.model.config.num_kv_heads
    texts = prepared.CALIBRATION, config.context, config.rows
    calibration = _texts(config, forcing, *texts, keep=True)
    seeds = range(config.seeds)

    def share(one: One) -> list[Row]:
        # what is only an input of the allocation is drawn once
        shared = one.bits == config.bits[0] and one.head is None
        made = losses.measure(calibration, one, seeds if shared else seeds[:1]).columns()
        return [{"kind": "head" if one.head is not None else "layer", **one.columns(), **made}]

    rule = Rule(config.window, 4, 64, True, bool(config.pre_rope))
    parts = [
        One(b, layer, part, rule=rule)
        for b in config.bits
        for part in "KV"
        for layer in range(layers)
    ]
    rows: list[Row] = []
    for one in track(parts, "layer_ablation: layers"):
        rows += journal.measure(f"{one}", partial(share, one), share=0.5)
    if config.heads:
        some = [
            One(config.bits[0], layer, part, head, rule)
            for part in "KV"
            for layer in range(layers)
            for head in range(heads)
        ]
        for one in track(some, "layer_ablation: heads"):
            rows += journal.measure(f"{one}", partial(share, one), share=0.7)
    return rows + list(_mixed(config, journal, forcing, rows))


def _texts(
    config: Config, forcing: Forcing, split: str, context: int, rows: int, keep: bool = False
) -> Subject:
    if config.model == "tiny":
        texts = {"random": prepared.random_texts(rows, context)}
    else:
        texts = prepared.texts(split, context, rows or None)
    return losses.subject(forcing, texts, prepared.PASS_TOKENS, keep)


def _mixed(config: Config, journal: Journal, forcing: Forcing, rows: list[Row]) -> Iterator[Row]:
    """Uniform and mixed caches of the same bytes on the test texts."""
    model = forcing.model.config
    shares = _shares(rows, model.num_layers)
    if shares is None:  # the time was over before every part was measured
        return
    heads = _heads(rows, model.num_layers, model.num_kv_heads)
    held: list[Subject] = []

    def judge(cached, columns: Row) -> list[Row]:
        if not held:
            texts = prepared.TEST, config.test_context, config.test_rows
            held.append(_texts(config, forcing, *texts))
        made = losses.measure(held[0], cached, range(config.seeds)).columns()
        return [{"kind": "mixed", **columns, "context": config.test_context, **made}]

    def mixed(budget: int, rule: Rule, short: bool) -> Iterator[tuple[str, Mixed, float]]:
        bits, total = allocate(shares, budget)
        yield "mixed", Mixed(bits, rule, short), total
        if heads is not None:
            bits, total = allocate(shared_by_heads(shares, heads), budget * model.num_kv_heads)
            yield "by head", Mixed(bits, rule, short), total

    for words in config.uniform:
        key_bits, value_bits = map(int, words.split())
        uniform = turbo(key_bits, value_bits, "trellis", window=config.window)
        uniform = pre_rope(uniform) if config.pre_rope else uniform
        budget = model.num_layers * (key_bits + value_bits)
        plain = sum(shares[i][key_bits] for i in range(model.num_layers))
        plain += sum(shares[i][value_bits] for i in range(model.num_layers, len(shares)))
        sizes = uniform.sizes(model, config.test_context)
        row: Row = {"preset": f"uniform {uniform.preset}", "allocation": "uniform"}
        row |= {"predicted": plain, **sizes}
        yield from journal.measure(row["preset"], partial(judge, uniform, row))
        for kind, cached, total in mixed(budget, uniform.rule, False):
            row = {"preset": f"{kind} {uniform.preset}", "allocation": cached.describe()}
            row |= {"predicted": total, **sizes}
            yield from journal.measure(row["preset"], partial(judge, cached, row))
    for words in config.short:
        budget, window, block = map(int, words.split())
        mean = Mean(budget / len(shares))
        setting = Setting("", mean, mean, window, 4, block, pre_rope=bool(config.pre_rope))
        sizes = setting.sizes(model, config.test_context)
        for kind, cached, total in mixed(budget, setting.rule, True):
            name = f"{kind} {budget} bits scale8 w{window} block{block}"
            name += " pre-RoPE" * setting.pre_rope
            row = {"preset": name, "allocation": cached.describe(), "predicted": total, **sizes}
            yield from journal.measure(name, partial(judge, cached, row))


def _shares(rows: Sequence[Row], layers: int) -> list[dict[int, float]] | None:
    """KL by bits of the keys of every layer, then of the values; None unless all are there."""
    shares: list[dict[int, float]] = []
    widths = set(distinct(where(rows, kind="layer"), "bits"))
    for part in "KV":
        for layer in range(layers):
            found = where(rows, kind="layer", part=part, layer=layer)
            shares.append({row["bits"]: row["kl"] for row in found})
    return shares if all(set(share) == widths for share in shares) else None


def _heads(rows: Sequence[Row], layers: int, heads: int) -> list[list[float]] | None:
    """KL of the heads of the keys of every layer, then of the values; None unless all are there."""
    found = [
        [row["kl"] for row in where(rows, kind="head", part=part, layer=layer)]
        for part in "KV"
        for layer in range(layers)
    ]
    return found if all(len(part) == heads for part in found) else None


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Where the loss is, and whether mixed bits pay."""
    return [*_where_the_loss_is(rows), *_mixing(rows), *_targets(rows)] or [
        Claim("our question", "where the loss is", "one part only", "undecided")
    ]


def _where_the_loss_is(rows: Sequence[Row]) -> Iterator[Claim]:
    for bits in distinct(where(rows, kind="layer"), "bits"):
        parts = where(rows, kind="layer", bits=bits)
        keys, values = (where(parts, part=part) for part in "KV")
        if not keys or len(keys) != len(values):
            continue
        total = sum(row["kl"] for row in parts)
        share = sum(row["kl"] for row in keys) / total
        yield Claim(
            "our question",
            f"keys carry more of the loss than values at {bits} bits",
            f"{share:.0%} of the sum over all parts, {total:.4f} nats",
            "holds" if share > 0.5 else "does not hold",
        )
        layers = len(keys)
        edge = [row for row in parts if row["layer"] in (0, 1, layers - 2, layers - 1)]
        first = sum(row["kl"] for row in edge) / total
        top = sorted(parts, key=lambda row: -row["kl"])[:5]
        yield Claim(
            "vLLM",
            f"the first two and last two layers carry more than their share at {bits} bits",
            f"{first:.0%} of the sum; the largest parts: "
            + ", ".join(f"{r['part']} of layer {r['layer']} {r['kl'] / total:.0%}" for r in top),
            "holds" if first > 4 / layers else "does not hold",
        )


def _mixing(rows: Sequence[Row]) -> Iterator[Claim]:
    found = {row["preset"]: row for row in where(rows, kind="mixed")}
    for name, mixed in found.items():
        kind = next((kind for kind in ("mixed", "by head") if name.startswith(f"{kind} ")), None)
        plain = "uniform" if kind == "mixed" else "mixed"
        uniform = found.get(name.replace(f"{kind} ", f"{plain} ", 1))
        if kind is None or uniform is None:
            continue
        yield Claim(
            "our question",
            f"bits by {'layer' if kind == 'mixed' else 'head'} lose less than {uniform['preset']} "
            "at equal bytes, on other texts",
            f"KL {mixed['kl']:.4f} ± {mixed['kl_se']:.4f} and {uniform['kl']:.4f} ± "
            f"{uniform['kl_se']:.4f} (predicted {mixed['predicted']:.4f}, "
            f"{uniform['predicted']:.4f}); perplexity {mixed['perplexity_change']:+.2%}, "
            f"{uniform['perplexity_change']:+.2%}",
            is_less(mixed, uniform),
        )


def _targets(rows: Sequence[Row]) -> Iterator[Claim]:
    """For each target the cache of the least KL among those of its bytes, at both lengths."""
    caches = where(rows, kind="mixed")
    for ratio, when in LENGTHS.items():
        for target, column, limit, words in TARGETS:
            enough = [row for row in caches if row[ratio] >= target]
            if not enough or column != "perplexity_change":
                continue
            row = min(enough, key=lambda row: row["kl"])
            verdict = is_below(row["perplexity_change"], row["perplexity_change_se"], limit)
            yield Claim(
                "our aim",
                f"at {target:g}x and more, true bytes {when}: {words} (the best of {len(enough)} "
                "caches, on the texts that judge)",
                f"{row['preset']} ({row['ratio']:.2f}x here, {row['ratio_64k']:.2f}x at 64K): "
                f"{row['perplexity_change']:+.2%} ± {row['perplexity_change_se']:.2%}, "
                f"KL {row['kl']:.4f} ± {row['kl_se']:.4f}",
                of_aim(verdict),
                topic=f"bits by layer or head, true bytes {when}",
                short=f"{target:g}x, {words}: {row['perplexity_change']:+.2%}",
            )


_CHANGE = ("perplexity_change", "perplexity_change_se")


def figure(rows: Sequence[Row]) -> Figure:
    """KL of every part, by layer; what uniform and mixed caches lose, over their bytes."""
    made, axes = panels(1, 3, 4.8, 3.4)
    for kind in ("uniform", "mixed", "by head"):
        caches = [r for r in where(rows, kind="mixed") if r["preset"].startswith(kind)]
        if caches:
            x, y, error = ([r[c] for r in caches] for c in ("ratio", *_CHANGE))
            axes[0, 2].errorbar(x, y, error, fmt="o", markersize=3, linewidth=0.8, label=kind)
    axes[0, 2].set_yscale("log")
    label(axes[0, 2], "whole caches, test texts", "ratio at 8,192 tokens", "change of perplexity")
    for part, axis in zip("KV", axes[0, :2], strict=True):
        for bits in sorted(distinct(where(rows, kind="layer"), "bits")):
            found = where(rows, kind="layer", part=part, bits=bits)
            axis.errorbar(
                [row["layer"] for row in found],
                [row["kl"] for row in found],
                [row["kl_se"] for row in found],
                fmt="o-",
                markersize=3,
                linewidth=0.8,
                label=f"{bits} bits",
            )
        heads = where(rows, kind="head", part=part)
        if heads:
            x, y = ([row[c] for row in heads] for c in ("layer", "kl"))
            axis.plot(x, y, "k.", ms=2, label=f"one head, {heads[0]['bits']} bits")
        axis.set_yscale("log")
        label(axis, f"only {'keys' if part == 'K' else 'values'} of one layer", "layer", "KL, nats")
    return made
