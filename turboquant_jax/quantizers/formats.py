"""What sets one code apart from another, as plain data: names, levels, bit planes. Needs no JAX."""

from typing import Literal, get_args

import numpy as np

from turboquant_jax.quantizers import codebook as codebooks
from turboquant_jax.quantizers import trellis_codebook

RotationKind = Literal["haar", "hadamard", "block_hadamard", "identity"]
ScaleMode = Literal["norm", "matched", "least_squares", "unbiased"]
Codebook = Literal["lloyd_max", "gaussian", "uniform", "grid"]
Code = Literal["scalar", "trellis"]
SketchKind = Literal["gaussian", "orthogonal"]
Widths = tuple[int, ...]


def widths(bits: int) -> Widths:
    """Plane widths of a b-bit index: the binary digits of b, in descending order.

    Raises:
      ValueError: bits outside 1-8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, expected between 1 and 8")
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def plane_widths(code: Code, bits: int) -> Widths:
    """Bit planes of an index of a code; a trellis keeps its path bit in a plane of its own."""
    if code == "scalar":
        return widths(bits)
    return (widths(bits - 1) if bits > 1 else ()) + (1,)


def plane_bytes(count: int, width: int) -> int:
    """Bytes of one plane of `width` bits over `count` elements."""
    return -(-count * width // 8)


def levels(code: Code, codebook: Codebook | np.ndarray, bits: int, dim: int) -> tuple[float, ...]:
    """The levels of a code of `bits` bits a coordinate of vectors of dimension `dim`.

    Raises:
      ValueError: an unknown code or codebook, levels that do not ascend, or bits that a trellis
        has no levels for.
    """
    if code not in get_args(Code):
        raise ValueError(f"code: got {code!r}, expected one of {', '.join(get_args(Code))}")
    if code == "trellis":
        if not (isinstance(codebook, str) and codebook in ("lloyd_max", "grid")):
            raise ValueError(
                f"codebook: got {codebook!r}, expected lloyd_max or grid: "
                "a trellis code has levels of its own"
            )
        on_grid = codebook == "grid"
        found = (trellis_codebook.grid_levels if on_grid else trellis_codebook.levels)(bits)
    else:
        found = _scalar_levels(codebook, bits, dim)
    return tuple(float(level) for level in found)


def _scalar_levels(codebook: Codebook | np.ndarray, bits: int, dim: int) -> np.ndarray:
    if isinstance(codebook, str):
        if codebook not in get_args(Codebook):
            names = ", ".join(get_args(Codebook))
            raise ValueError(f"codebook: got {codebook!r}, expected one of {names}, or levels")
        if codebook == "uniform":
            return codebooks.uniform(bits, dim)
        found = codebooks.lloyd_max(bits, None if codebook == "gaussian" else dim)
        return codebooks.on_grid(found, dim) if codebook == "grid" else found
    found = np.asarray(codebook, np.float64)
    if found.shape != (2**bits,) or not np.all(np.diff(found) > 0):
        raise ValueError(
            f"codebook: got {found.tolist()}, "
            f"expected {2**bits} strictly ascending levels for {bits} bits"
        )
    return found
