"""Models that are quick to compile, and a place of its own for what is compiled."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from turboquant_jax.cli import compiling
from turboquant_jax.models import PRESETS, LlamaConfig
from turboquant_jax.models.tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """The command would keep programs in the user's folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        monkeypatch.setenv(compiling.VARIABLE, "off")


@pytest.fixture
def tiny(monkeypatch):
    """The name of a model of random weights, whose tokens are bytes."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=256,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        eos_ids=(299,),
    )
    monkeypatch.setitem(PRESETS, "tiny", config)
    return "random:tiny"


@pytest.fixture
def folder(tmp_path):
    """`folder(head_dim)`: a Hugging Face folder with random weights and a chat template."""

    def write(head_dim=16, hidden=32, ffn=48, heads=4, kv_heads=2):
        path = tmp_path / f"tiny-{head_dim}"
        path.mkdir()
        tokenizer = byte_tokenizer(300).backend
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "chat_template.jinja").write_text(TEMPLATE)
        config = {
            "model_type": "llama",
            "vocab_size": 302,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "eos_token_id": 301,
        }
        (path / "config.json").write_text(json.dumps(config))
        rng, layer = np.random.default_rng(3), "model.layers.0"
        shapes = {
            "model.embed_tokens": (302, hidden),
            f"{layer}.self_attn.q_proj": (heads * head_dim, hidden),
            f"{layer}.self_attn.k_proj": (kv_heads * head_dim, hidden),
            f"{layer}.self_attn.v_proj": (kv_heads * head_dim, hidden),
            f"{layer}.self_attn.o_proj": (hidden, heads * head_dim),
            f"{layer}.mlp.gate_proj": (ffn, hidden),
            f"{layer}.mlp.up_proj": (ffn, hidden),
            f"{layer}.mlp.down_proj": (hidden, ffn),
        }
        weights = {n: rng.normal(0, s[-1] ** -0.5, s) for n, s in shapes.items()}
        # so that answers are text: the first 94 tokens are what ASCII prints, but for the space
        weights["model.embed_tokens"][94:] *= 0.1
        for norm in ("model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"):
            weights[norm] = np.ones(hidden)
        arrays = {f"{name}.weight": w.astype(np.float32) for name, w in weights.items()}
        save_file(arrays, path / "model.safetensors")
        return path

    return write
