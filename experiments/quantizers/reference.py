"""Expected relative errors of the scale modes, from simulations independent of this library.

`SCALE_ERROR[dim, bits]` is E|x - x~|^2 / |x|^2 for (norm, least_squares, matched, unbiased) on the
uniform sphere: norm is exact, the others were estimated from 30,000 to 400,000 vectors, to a
relative standard error of at most `RELATIVE_ERROR`.
"""

MODES = ("norm", "least_squares", "matched", "unbiased")
RELATIVE_ERROR = 0.003

SCALE_ERROR = {
    (64, 1): (0.35839, 0.35771, 0.39799, 0.56365),
    (64, 2): (0.11453, 0.11299, 0.11651, 0.12803),
    (64, 3): (0.03339, 0.03250, 0.03279, 0.03367),
    (64, 4): (0.009132, 0.008809, 0.008830, 0.008895),
    (128, 1): (0.36089, 0.36052, 0.40108, 0.56717),
    (128, 2): (0.11600, 0.11525, 0.11885, 0.13061),
    (128, 3): (0.03397, 0.03350, 0.03380, 0.03471),
    (128, 4): (0.009315, 0.009144, 0.009166, 0.009234),
    (256, 1): (0.36214, 0.36198, 0.40269, 0.56906),
    (256, 2): (0.11674, 0.11632, 0.11995, 0.13181),
    (256, 3): (0.03426, 0.03403, 0.03433, 0.03525),
    (256, 4): (0.009408, 0.009322, 0.009344, 0.009412),
    (1536, 1): (0.36317, 0.36312, 0.40394, 0.57043),
    (1536, 2): (0.11736, 0.11726, 0.12092, 0.13286),
    (1536, 3): (0.03450, 0.03447, 0.03477, 0.03570),
    (1536, 4): (0.009485, 0.009467, 0.009490, 0.009558),
}


def scale_error(dim: int, bits: int, mode: str) -> float | None:
    """The tabulated error of a scale mode, None where there is no entry."""
    errors = SCALE_ERROR.get((dim, bits))
    return errors[MODES.index(mode)] if errors else None


def slope(error: float, mode: str) -> float:
    """E<v, x~> / <v, x> under Haar from the error of the mode; 1 for an unbiased one.

    norm: 1 - D. least_squares: E cos^2 = 1 - error. matched: E cos = 1 - error / 2.
    """
    return {"norm": 1 - error, "least_squares": 1 - error, "matched": 1 - error / 2}.get(mode, 1.0)
