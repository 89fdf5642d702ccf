"""The tables of docs/models.md, which `python -m tests.models.test_served` makes from the code."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from tests.models import test_formats, test_reference
from turboquant_jax import cache
from turboquant_jax.attention import Projection, triton
from turboquant_jax.cache.choose import choose_attention
from turboquant_jax.models.gguf_keys import ARCHITECTURES as GGUF
from turboquant_jax.models.gguf_keys import ROPE_SCALINGS
from turboquant_jax.models.huggingface_config import config_from_huggingface
from turboquant_jax.models.huggingface_keys import HF_ROPE, MODEL_TYPES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- made by tests.models.test_served -->\n\n", "\n<!-- end -->"
HEAD = (
    "model_type",
    "beside Llama",
    "GGUF",
    "XLA",
    "fused decode",
    "cuDNN prefill",
    "logits against",
)


def features(config):
    """What sets a decoder apart from Llama's, but for RoPE."""
    names = {
        "biases of q, k, v": config.qkv_bias,
        "of o": config.o_bias,
        "of the MLP": config.mlp_bias,
        "norms of queries and keys": config.qk_norm,
        "sliding window": config.sliding_window is not None,
    }
    return ", ".join(name for name, there in names.items() if there) or "nothing"


def gguf_name(kind):
    """What GGUF calls a type whose two formats are tested to give one decoder."""
    for name, (*_, metadata) in test_formats.ARCHITECTURES.items():
        found = metadata.get("general.architecture", "llama")
        if name.split()[0] == kind and found in GGUF:
            return f"`{found}`"
    return "no"


def served(config, queries, implementation):
    """ "yes", or why a cache of this decoder's is not attended to in this way on a GPU."""
    window = None if config.sliding_window is None else 1024  # more than is kept in full precision
    shape = cache.CacheConfig(2, 2, 64, sliding_window=window)
    state = jax.eval_shape(lambda: cache.create(shape, 1, 4096, key=jax.random.key(0)))
    try:
        with mock.patch.object(jax, "default_backend", lambda: "gpu"):
            choose_attention(state, queries, config.attention_softcap, implementation)
    except NotImplementedError as error:
        return "no: " + str(error).split(" got ", 1)[1]
    return "yes"


def fused(config):
    """As `served`, and whether RoPE runs in the kernel that rotates the queries."""
    found = served(config, 1, "pallas")
    qkv = jax.ShapeDtypeStruct((1, 1, 2, 4, config.head_dim), jnp.bfloat16)
    angles = jax.ShapeDtypeStruct((1, 1, config.rotated_channels // 2), jnp.float32)
    turns = found == "yes" and triton.turns(Projection(qkv, angles, angles))
    return found + ", RoPE too" * turns


def tables():
    rows = {}
    for options in test_reference.ARCHITECTURES.values():
        entries = {"hidden_act": "silu", **test_reference.SIZES, **options}
        kind = entries.pop("kind")
        config = config_from_huggingface({"model_type": kind, **entries})
        key = (f"`{kind}`", features(config))
        paths = served(config, 1, "xla"), fused(config), served(config, 512, "cudnn")
        rows[key] = [*key, gguf_name(kind), *paths, "transformers, numpy"]
    assert {kind.strip("`") for kind, _ in rows} == MODEL_TYPES.keys()
    gguf = {"default": "none", "llama3": "rope_freqs.weight"}
    assert {gguf.get(kind, kind) for kind in HF_ROPE} <= {*ROPE_SCALINGS, "rope_freqs.weight"}
    kinds = [[f"`{kind}`", f"`{gguf.get(kind, kind)}`"] for kind in HF_ROPE]
    between = (
        "\nRoPE by the name that `config.json` has for it, and what a GGUF file has instead:\n\n"
    )
    return _table(HEAD, sorted(rows.values())) + between + _table(("RoPE", "GGUF"), kinds)


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def test_the_page_says_what_the_code_does():
    assert tables() in PAGE.read_text()


if __name__ == "__main__":
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(head + BEGIN + tables() + END + rest.split(END)[1])
