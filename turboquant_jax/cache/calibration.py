"""What is known about a model: in which basis its keys, and values, are best coded.

Of the vectors x of a head (keys as they are compressed, centred) and of what meets them (the
queries of its group) calibration texts give the second moments S_x and S_q. With

    S_q^1/2 S_x S_q^1/2 = U L U^T,    B = S_q^1/2 U L^-1/4,    x' = B^T x,    q' = B^-1 q,

<q', x'> = <q, x>, and both have the second moment diag(L^1/2): an error in channel i of x' costs
the products its square times L_i^1/2, and channel i varies by as much. `quantizers.channels` gives
the first channels more bits. An output is a linear function of the values, which meet no query: for
them S_q is the identity, or the metric in which their error counts.

A file (`calibration_file`) has the basis of every head and what each format of it loses, so that it
serves any target (`fitting`).
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float

from turboquant_jax.cache.allocation import Allocation, Losses
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.quantizers.channels import Basis

_SIDES = "key", "value"

CLIP = 1e-5
"""Least eigenvalue of S_q and of L, of the largest: a channel that no text met stays invertible."""


@dataclass(frozen=True)
class Study:
    """What was measured of a model, and chosen.

    Attributes:
      model: its name.
      weights: digest of the weights that make its keys.
      texts: (name, digest, tokens) of what it read.
      versions: (package, version) of what computed.
      rule: (name, number) of what the cache was like: sinks, window, block, bits of scales; and of
        what was read: tokens of a window, windows, those on which parts were compressed alone.
      codec: (name, value) of `CodecConfig`, for all formats.
      centring: "pre_rope", "stored" or "none", of the keys.
      losses: of every format of every head.
      target: what the allocation was chosen for.
      allocation: chosen; and `predicted`, the sum of its losses, `measured`, its KL on a text that
        did not choose it, both in nats a token.
    """

    model: str
    weights: str
    texts: tuple[tuple[str, str, int], ...]
    versions: tuple[tuple[str, str], ...]
    rule: tuple[tuple[str, int], ...]
    codec: tuple[tuple[str, str], ...]
    centring: str
    losses: Losses = field(repr=False)
    target: str
    allocation: Allocation
    predicted: float
    measured: float

    @property
    def scale_bits(self) -> int:
        """Of the caches that the bytes are of."""
        return dict(self.rule).get("scale_bits", 16)


@register_dataclass
@dataclass(frozen=True)
class Calibration:
    """The bases of a model's keys and values [layers, K, ...]; None for those coded without.

    `study` is what a file says beside them.
    """

    keys: Basis | None = None
    values: Basis | None = None
    study: Study | None = field(default=None, metadata={"static": True})


def bases(
    config: CacheConfig, calibration: Calibration | None
) -> tuple[Basis | None, Basis | None]:
    """What the codecs of keys and of values take of a calibration.

    Raises:
      ValueError: one that no codec asks for, or that lacks what a codec asks for.
    """
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    found: list[Basis | None] = []
    for name in _SIDES:
        basis = None if calibration is None else getattr(calibration, f"{name}s")
        if all(getattr(form, name).scales == "group" for form in config.formats):
            basis = None
        elif basis is None:
            raise ValueError(
                f"{name}.scales: got one for all groups, expected a calibration of the {name}s"
            )
        elif basis.variance.shape != shape:
            raise ValueError(
                f"calibration of the {name}s: got {basis.variance.shape} layers, heads and "
                f"channels, expected {shape}"
            )
        found.append(basis)
    # where every head of a calibrated codec got plain bits, none needs a basis
    asked = {getattr(form, name).scales for form in (config, *config.formats) for name in _SIDES}
    if calibration is not None and asked == {"group"}:
        raise ValueError("calibration: got one, expected a codec with scales='joint'")
    return found[0], found[1]


def moments(
    q: Float[Array, "T N H"], x: Float[Array, "T K H"]
) -> tuple[Float[Array, "K H H"], Float[Array, "K H H"]]:
    """S_x and S_q of each kv head over a text, float32; N query heads share K heads.

    x: keys as they are compressed, after RoPE and centring. The moments of several texts are added
    up as they are means: weighted by the tokens.
    """
    tokens, heads, dim = x.shape
    x = x.astype(jnp.float32)
    grouped = q.astype(jnp.float32).reshape(tokens, heads, -1, dim)
    of_x = jnp.einsum("tki,tkj->kij", x, x, precision="highest") / tokens
    of_q = jnp.einsum("tkgi,tkgj->kij", grouped, grouped, precision="highest")
    return of_x, of_q / (tokens * grouped.shape[2])


def from_moments(
    of_x: Float[Array | np.ndarray, "*heads H H"], of_q: Float[Array | np.ndarray, "*heads H H"]
) -> Basis:
    """The basis of each head from its second moments S_x and S_q; computed in float64.

    B is rounded to float16, its largest entry between 1/2 and 1: the unit of a basis is free, its
    inverse and variances have it too. A head whose vectors, or queries, are all zero has the basis
    that the other moment gives.

    Raises:
      ValueError: moments of different shapes, or that are not finite.
    """
    x, q = (np.asarray(moment, np.float64) for moment in (of_x, of_q))
    if x.shape != q.shape or not (np.all(np.isfinite(x)) and np.all(np.isfinite(q))):
        raise ValueError(
            f"moments: got shapes {x.shape} and {q.shape}, expected the same, and finite numbers"
        )
    values, vectors = _eigen(q)
    root = (vectors * np.sqrt(values)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    values, vectors = _eigen(root @ x @ root)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    matrix = root @ vectors * values[..., None, :] ** -0.25
    largest = np.max(np.abs(matrix), axis=(-2, -1))
    unit = np.exp2(-np.ceil(np.log2(largest)))  # a power of two: codes do not know of it
    matrix = (matrix * unit[..., None, None]).astype(np.float16).astype(np.float32)
    # of the matrix as it is stored, so that products are exact
    return of_matrix(matrix, np.sqrt(values) * unit[..., None] ** 2)


def of_matrix(
    matrix: Float[np.ndarray, "*heads H H"], variance: Float[np.ndarray, "*heads H"]
) -> Basis:
    """The basis of these matrices, with their inverse."""
    inverse = np.linalg.inv(matrix.astype(np.float64))
    return Basis(*(jnp.asarray(x, jnp.float32) for x in (matrix, inverse, variance)))


def identity(num_layers: int, num_kv_heads: int, head_dim: int) -> Calibration:
    """That of a model of which nothing is known: every channel as it is, of variance 1."""
    shape = (num_layers, num_kv_heads, head_dim)
    eye = jnp.broadcast_to(jnp.eye(head_dim), (*shape, head_dim))
    basis = Basis(eye, eye, jnp.ones(shape))
    return Calibration(basis, basis)


def _eigen(moment: Float[np.ndarray, "*heads H H"]):
    """Eigenvalues, ascending and clipped, and eigenvectors of symmetric matrices."""
    values, vectors = np.linalg.eigh((moment + np.swapaxes(moment, -1, -2)) / 2)
    largest = values[..., -1:]
    return np.maximum(values, np.where(largest > 0, CLIP * largest, 1.0)), vectors
