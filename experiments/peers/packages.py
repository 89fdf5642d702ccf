"""Other quantizers, from their own packages: product quantization and RaBitQ.

`faiss-cpu` has product quantization and an implementation of RaBitQ; `rabitqlib` is the RaBitQ
authors' library (both on PyPI). Each is built over unit vectors for inner products; a missing
package is a `MissingDataError`.
"""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.harness.data import MissingDataError

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
NAMES = ("pq", "rabitq", "rabitq_faiss")
_MODULES = {
    "pq": ("faiss", "faiss-cpu==1.15.1"),
    "rabitq_faiss": ("faiss", "faiss-cpu==1.15.1"),
    "rabitq": ("rabitqlib", "rabitqlib==0.7.1"),
}
_PQ_BITS = 8  # 256 centroids a sub-quantizer, as in the paper's comparison


@dataclass(frozen=True)
class Index:
    """A built index.

    Attributes:
      search: queries [n, d] and k to ids [n, k], best first.
      bytes_per_vector: what is stored for each vector.
      train_seconds: time that went into codebooks, 0 where there are none.
      encode_seconds: time that went into the codes of all vectors.
    """

    search: Callable[[Float[np.ndarray, "n d"], int], Int[np.ndarray, "n k"]]
    bytes_per_vector: float
    train_seconds: float
    encode_seconds: float


def is_installed(name: str) -> bool:
    """Whether the package of a peer is there."""
    return importlib.util.find_spec(_MODULES[name][0]) is not None


def build(
    name: str, x: Float[np.ndarray, "n d"], bits: int, *, train: int, iterations: int = 10
) -> Index:
    """Encode `x` at `bits` bits per coordinate.

    Args:
      name: "pq", "rabitq" (the authors' library) or "rabitq_faiss".
      x: float32 unit vectors.
      bits: bits per coordinate; product quantization spends them on d bits / 8 sub-quantizers.
      train: how many of the vectors train a codebook, where there is one.
      iterations: k-means iterations of product quantization (the package's default is 25).

    Raises:
      MissingDataError: the package is not installed.
      ValueError: an unknown name.
    """
    if name not in _MODULES:
        raise ValueError(f"peer must be one of {', '.join(_MODULES)}, got {name!r}")
    if not is_installed(name):
        raise MissingDataError(f"{name} is missing: pip install --no-deps {_MODULES[name][1]}")
    if name == "rabitq":
        return _rabitqlib(x, bits)
    import faiss

    # k-means over two coordinates at a time: threads would mostly wait for each other
    faiss.omp_set_num_threads(1 if name == "pq" else THREADS)
    if name == "pq":
        index: Any = faiss.IndexPQ(
            x.shape[1], x.shape[1] * bits // _PQ_BITS, _PQ_BITS, faiss.METRIC_INNER_PRODUCT
        )
        index.pq.cp.niter = iterations
        index.pq.cp.min_points_per_centroid = 1  # only silences a warning
    else:
        index = faiss.IndexRaBitQ(x.shape[1], faiss.METRIC_INNER_PRODUCT, bits)
    start = time.perf_counter()
    index.train(x[:train])
    trained = time.perf_counter()
    faiss.omp_set_num_threads(THREADS)
    index.add(x)
    done = time.perf_counter()

    def search(queries: np.ndarray, k: int) -> np.ndarray:
        return index.search(queries, k)[1]

    return Index(search, float(index.code_size), trained - start, done - trained)


def _rabitqlib(x: Float[np.ndarray, "n d"], bits: int) -> Index:
    """One cluster around the mean, every vector scored: quantization alone is compared."""
    import rabitqlib

    index = rabitqlib.IvfIndex(x.shape[1], len(x), 1, bits, "ip")
    start = time.perf_counter()
    centre = x.mean(axis=0, keepdims=True)
    index.build(x, centre, np.zeros(len(x), np.uint32), THREADS, False)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index")
        index.save(str(path))
        size = path.stat().st_size / len(x)

    def search(queries: np.ndarray, k: int) -> np.ndarray:
        return index.search(queries, k, 1, num_threads=THREADS)[0]

    return Index(search, size, 0.0, seconds)
