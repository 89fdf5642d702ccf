"""Texts and questions as token ids, in one file a model that `tasks.pack_data` makes.

So the experiments on a language model need no package of data, and can run on a machine that has
none: `.data/` holds `<model>.npz`, and the weights, `<model>.gguf`. Only SmolLM2's are also looked
for in their package; those of the Qwen models must be put there.
"""

from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from experiments.harness.data import MissingDataError
from turboquant_jax import models
from turboquant_jax.models import Llama, LlamaConfig

FOLDER = Path(".data")
SMOLLM2 = "smollm2-135m"
MODELS = (SMOLLM2, "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
PASS_TOKENS = 65536
"""Tokens of one pass over a batch, whatever the length of its texts."""

NEEDS = "token ids in .data/ by python -m experiments.tasks.pack_data, and for its full size a GPU"
"""Of experiments on them."""

CALIBRATION, TEST, LANGUAGE = "calibration", "test", "language"
"""Splits: what chooses, what judges, and what judges apart: a text that is not in English."""


def texts_file(model: str) -> Path:
    """Where the token ids of a model are."""
    return FOLDER / f"{model}.npz"


def weights_file(model: str) -> Path:
    """Where the weights of a model are."""
    return FOLDER / f"{model}.gguf"


@lru_cache(maxsize=1)
def _arrays(model: str) -> dict[str, np.ndarray]:
    file = texts_file(model)
    if not file.is_file():
        raise MissingDataError(f"no {file}: python -m experiments.tasks.pack_data")
    with np.load(file) as held:
        return {name: held[name] for name in held.files}


def texts(
    split: str, context: int, rows: int | None = None, model: str = SMOLLM2
) -> dict[str, Int[np.ndarray, "n T"]]:
    """Name -> token ids of the texts of a split, cut into texts of `context` tokens.

    `rows` takes that many of each, from its beginning; the ids are those of the `model`.

    Raises:
      MissingDataError: the file is not there.
    """
    found = {}
    for name, array in _arrays(model).items():
        kind, *where = name.split("/")
        if kind == "texts" and where[0] == split:
            found[where[1]] = array.reshape(-1, context)[:rows].astype(np.int32)
    return found


def prompts(name: str, model: str = SMOLLM2) -> dict[str, np.ndarray]:
    """Arrays of a model's prompts by name, such as "needle/single/1024".

    Raises:
      MissingDataError: the file is not there.
    """
    prefix = f"prompts/{name}/"
    return {k.removeprefix(prefix): v for k, v in _arrays(model).items() if k.startswith(prefix)}


@lru_cache(maxsize=1)
def model(name: str) -> Llama:
    """One of `MODELS`, in float32, or "tiny": random weights, for tests.

    Raises:
      MissingDataError: its weights are not in `.data/`, nor in SmolLM2's package.
      ValueError: another name.
    """
    if name == "tiny":
        return jax.jit(lambda: Llama(TINY, nnx.Rngs(0), jnp.float32))()
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected 'tiny' or one of {', '.join(MODELS)}")
    file = weights_file(name)
    packaged = name == SMOLLM2 and not file.is_file()
    try:
        return models.load(None if packaged else file, stacked=False).model
    except FileNotFoundError as error:
        raise MissingDataError(str(error)) from error


TINY = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=256,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
)


def random_texts(count: int, context: int) -> Int[np.ndarray, "n T"]:
    """Texts for the tiny model."""
    draw = np.random.default_rng(0).integers(0, TINY.vocab_size, (count, context))
    return draw.astype(np.int32)
