"""What is known about a model, in a file: the bases of its heads, and what their formats lose.

One safetensors file. The matrices are float16, which they were rounded to when they were made;
inverses are made anew. The header has the facts, and a SHA-256 over all of it.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from turboquant_jax.cache import files
from turboquant_jax.cache.allocation import Allocation, Losses, nested
from turboquant_jax.cache.calibration import Calibration, Study, of_matrix

FORMAT = "turboquant-jax calibration 1"
_WHAT = "a calibration"


def save_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write a calibration to `path`, whole or not at all.

    Raises:
      ValueError: one without a study, or whose matrices are not those of `from_moments`.
    """
    study = calibration.study
    if study is None:
        raise ValueError("calibration: got one without a study, expected one that was measured")
    arrays: dict[str, np.ndarray] = {}
    for side in ("keys", "values"):
        arrays[f"{side}.losses"] = np.asarray(getattr(study.losses, side), np.float64)
        basis = getattr(calibration, side)
        if basis is not None:
            matrix = np.asarray(basis.matrix).astype(np.float16)
            if not np.array_equal(matrix.astype(np.float32), basis.matrix):
                raise ValueError(f"matrices of the {side}: got float32, expected them in float16")
            arrays[f"{side}.matrix"] = matrix
            arrays[f"{side}.variance"] = np.asarray(basis.variance, np.float32)
    facts = asdict(study) | {"losses": [study.losses.key_formats, study.losses.value_formats]}
    files.write(Path(path), arrays, {"format": FORMAT, "study": json.dumps(facts)})


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration that `save_calibration` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or another one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected {_WHAT}")
    facts, arrays = files.read(path, _WHAT)
    if facts.get("format") != FORMAT or "study" not in facts:
        raise ValueError(f"{path}: got format {facts.get('format')}, expected {FORMAT!r}")
    files.check(path, facts, ("format", "study"), arrays)
    found = json.loads(facts["study"], object_hook=_tuples)
    menus = found.pop("losses")
    losses = Losses(*menus, *(nested(arrays[f"{side}.losses"]) for side in ("keys", "values")))
    allocation = Allocation(**found.pop("allocation"))
    bases = {
        side: of_matrix(arrays[f"{side}.matrix"].astype(np.float32), arrays[f"{side}.variance"])
        for side in ("keys", "values")
        if f"{side}.matrix" in arrays
    }
    return Calibration(**bases, study=Study(losses=losses, allocation=allocation, **found))


def _tuples(found: dict) -> dict:
    """JSON's lists as the tuples that they were."""

    def frozen(x: Any) -> Any:
        return tuple(map(frozen, x)) if isinstance(x, list) else x

    return {name: frozen(x) for name, x in found.items()}
