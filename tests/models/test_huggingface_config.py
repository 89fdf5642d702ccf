"""Published `config.json` of Qwen and Mistral, and the rules of windows and RoPE in such files."""

import dataclasses
import math

import pytest

from turboquant_jax.models.huggingface_config import config_from_huggingface
from turboquant_jax.models.presets import PRESETS
from turboquant_jax.models.rope_scaling import LinearScaling, YarnScaling

# config.json of Qwen/Qwen2.5-7B-Instruct
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# config.json of Qwen/Qwen3-0.6B
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# config.json of mistralai/Mistral-7B-v0.1
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 1024}


def test_published_configs_are_the_presets():
    stops = {"eos_token_id": [151645, 151643]}  # generation_config.json
    assert config_from_huggingface(QWEN2_5 | stops) == PRESETS["qwen2.5-7b"]
    assert config_from_huggingface(QWEN3 | stops) == PRESETS["qwen3-0.6b"]
    assert config_from_huggingface(MISTRAL) == PRESETS["mistral-7b-v0.1"]
    third = {"sliding_window": None, "vocab_size": 32768, "rope_theta": 1000000.0}
    assert config_from_huggingface(MISTRAL | third) == PRESETS["mistral-7b-v0.3"]


def test_what_a_file_may_leave_out_is_as_in_transformers():
    def without(entries, *keys):
        return config_from_huggingface({k: v for k, v in entries.items() if k not in keys})

    assert without(MISTRAL, "sliding_window", "num_key_value_heads") == PRESETS["mistral-7b-v0.1"]
    found = without(QWEN3, "head_dim", "bos_token_id", "eos_token_id")
    assert (found.head_dim, found.bos_id, found.eos_ids) == (128, None, ())


@pytest.mark.parametrize("entries", [QWEN2_5, QWEN3])
def test_a_window_holds_in_all_layers_or_in_none(entries):
    window = entries | WINDOW
    assert config_from_huggingface(window).sliding_window is None  # from layer 28 on, of 28
    assert config_from_huggingface(window | {"max_window_layers": 0}).sliding_window == 1024
    kinds = ["sliding_attention"] * 28
    assert config_from_huggingface(window | {"layer_types": kinds}).sliding_window == 1024
    long = {"sliding_window": 40960, "max_window_layers": 0}
    assert config_from_huggingface(window | long).sliding_window is None
    for changes in (
        {"max_window_layers": 21},
        {"layer_types": ["full_attention", *kinds[1:]]},
        {"layer_types": kinds, "use_sliding_window": False},
    ):
        with pytest.raises(ValueError, match="windows by layer are not served"):
            config_from_huggingface(window | changes)


def test_biases_and_norms():
    qwen2, qwen3 = config_from_huggingface(QWEN2_5), config_from_huggingface(QWEN3)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    biased = config_from_huggingface(QWEN3 | {"attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)
    llama = {"model_type": "llama", "architectures": None, "sliding_window": None}
    biased = config_from_huggingface(MISTRAL | llama | {"attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_rope():
    qwen = config_from_huggingface(QWEN2_5)

    def scaling(**rope):
        found = config_from_huggingface(QWEN2_5 | {"rope_scaling": rope})
        assert dataclasses.replace(found, rope_scaling=None) == qwen
        return found.rope_scaling

    assert scaling(type="linear", factor=2.0) == LinearScaling(2.0)
    # 0.1 ln 4 + 1, as in the paper
    assert scaling(type="yarn", factor=4.0) == YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1)
    given = dict(type="yarn", factor=4.0, original_max_position_embeddings=8192)
    assert scaling(**given, attention_factor=1.5, truncate=False, beta_slow=2) == YarnScaling(
        4.0, 8192, 1.5, beta_slow=2, truncate=False
    )
    # DeepSeek's: (0.1 * 2 ln 4 + 1) / (0.1 ln 4 + 1)
    both = scaling(**given, mscale=2.0, mscale_all_dim=1.0)
    assert both.attention_factor == pytest.approx(1.2772589 / 1.1386294)


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        (QWEN2_5, {"attention_bias": False}, "attention_bias: got False, expected True"),
        (QWEN2_5, {"mlp_bias": True}, "mlp_bias: got True, expected False"),
        (QWEN2_5, {"use_mrope": True}, "use_mrope: got True"),
        (MISTRAL, {"attention_bias": True}, "attention_bias: got True, expected False"),
        (MISTRAL, {"sliding_window": -1}, "sliding_window: got -1, expected a positive integer"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types: got"),
        (QWEN3, {"num_experts": 128}, "num_experts: got 128, expected no such key"),
        (QWEN3, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope', expected"),
        (QWEN3, {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_slow"),
        (QWEN3, {"rope_scaling": {"type": "yarn", "factor": -2.0}}, "factor: got -2.0"),
    ],
)
def test_refusals(entries, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(entries | changes)
