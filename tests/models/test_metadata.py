"""Configurations of both formats, and every key that changes the computation refused."""

import dataclasses
import math

import numpy as np
import pytest

from turboquant_jax.models.huggingface_config import config_from_huggingface
from turboquant_jax.models.metadata import config_from_gguf
from turboquant_jax.models.presets import PRESETS
from turboquant_jax.models.rope import inverse_frequencies
from turboquant_jax.models.rope_scaling import LinearScaling, YarnScaling

# config.json of meta-llama/Llama-3.1-8B-Instruct
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}

# config.json of HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def without(entries, *keys):
    return {k: v for k, v in entries.items() if k not in keys}


def test_published_configs_are_the_presets():
    assert config_from_huggingface(LLAMA_3_1) == PRESETS["llama-3.1-8b"]
    assert config_from_huggingface(SMOLLM2) == PRESETS["smollm2-135m"]


def test_transformers_5_keeps_theta_with_the_scaling():
    rope = {**LLAMA_3_1["rope_scaling"], "rope_theta": 500000.0}
    entries = without(LLAMA_3_1, "rope_scaling", "rope_theta", "torch_dtype")
    entries |= {"rope_parameters": rope, "dtype": "bfloat16"}
    assert config_from_huggingface(entries) == PRESETS["llama-3.1-8b"]
    entries["rope_parameters"] = {"rope_type": "default", "rope_theta": 100000}
    assert config_from_huggingface(entries).rope_theta == 100000
    assert config_from_huggingface(entries).rope_scaling is None


def test_what_a_file_may_leave_out():
    config = config_from_huggingface(without(SMOLLM2, "num_key_value_heads", "eos_token_id"))
    assert (config.num_kv_heads, config.head_dim, config.eos_ids) == (9, 64, (2,))
    assert config_from_huggingface({**SMOLLM2, "eos_token_id": None}).eos_ids == ()
    assert config_from_huggingface({**SMOLLM2, "head_dim": 32}).head_dim == 32
    # as `LlamaConfig` of transformers reads such a file
    absent = "rms_norm_eps", "rope_theta", "bos_token_id", "tie_word_embeddings"
    config = config_from_huggingface(without(SMOLLM2, *absent))
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10_000.0)
    assert (config.bos_id, config.tie_embeddings) == (1, False)


HARMLESS = {
    "max_length": 2048,
    "temperature": 0.6,
    "top_p": 0.9,
    "do_sample": True,
    "max_sequence_length": 2048,
    "auto_map": {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"},
    "gradient_checkpointing": False,
    "layer_types": ["full_attention"] * 30,
    "sliding_window": 8192,  # the context
    "use_sliding_window": False,
    "pruned_heads": {},
    "tokenizer_class": "LlamaTokenizer",
}


@pytest.mark.parametrize("key", HARMLESS)
def test_harmless_keys(key):
    got = config_from_huggingface({**SMOLLM2, key: HARMLESS[key]})
    assert got == PRESETS["smollm2-135m"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_moe"}, "model_type: got 'qwen2_moe', expected 'llama' or 'mistral'"),
        ({"model_type": ["llama"]}, "model_type: got"),
        ({"model_type": "qwen3"}, r"architectures: got .* expected \['Qwen3ForCausalLM'\]"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: got"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        ({"attention_bias": "no"}, "attention_bias: got 'no', expected False or True"),
        ({"mlp_bias": 2}, "mlp_bias: got 2"),
        ({"sliding_window": 4096}, "sliding_window: got 4096, expected none below the context"),
        ({"sliding_window": "9999"}, "sliding_window: got '9999'"),
        ({"use_sliding_window": True}, "use_sliding_window: got True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: got"),
        ({"layer_types": "full_attention"}, "layer_types: got"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: got"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: got"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved: got True"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "'dynamic', expected 'default'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor: got '2'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: got nothing"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers: got '30'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: got nothing"),
        ({"rope_scaling": {**LLAMA_3_1["rope_scaling"], "factor": "8"}}, "factor: got '8'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: got 'no', expected True or False"),
        ({"rope_scaling": {"rope_type": "llama3", "beta_fast": 32}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": 2.0}, "rope_scaling: got 2.0, expected an object"),
        ({"logit_scale": 0.5}, "logit_scale: got 0.5, expected no such key"),
        ({"hidden_size": None}, "hidden_size: got nothing"),
        ({"hidden_size": 577}, "got 9 heads, expected a divisor of hidden size 577"),
        ({"num_attention_heads": [9, 9]}, "heads, expected a divisor"),
        ({"vocab_size": "49152"}, "vocab_size: got '49152'"),
        ({"eos_token_id": "</s>"}, "eos_ids: got '</s>', expected integers"),
    ],
)
def test_huggingface_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface({**SMOLLM2, **changes})


def test_a_file_without_a_type_is_refused():
    with pytest.raises(ValueError, match="model_type: got nothing"):
        config_from_huggingface(without(SMOLLM2, "model_type"))


GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.context_length": 131072,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 14336,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 128,
    "llama.vocab_size": 128256,
    "tokenizer.ggml.bos_token_id": 128000,
    "tokenizer.ggml.eos_token_id": 128009,
}
UNTIED = {"output.weight"}  # of the tensors, what a configuration is read from


def gguf_of(architecture, **changes):
    """`GGUF` of another architecture; changes without their prefix, __ for a dot."""
    entries = {k.replace("llama.", architecture + "."): v for k, v in GGUF.items()}
    entries |= {f"{architecture}.{k.replace('__', '.')}": v for k, v in changes.items()}
    return entries | {"general.architecture": architecture}


def test_gguf_metadata():
    expected = dataclasses.replace(PRESETS["llama-3-8b"], max_position=131072, eos_ids=(128009,))
    assert config_from_gguf(GGUF, UNTIED) == expected


@pytest.mark.parametrize("window", [0, 131072, 2**20])
def test_a_window_of_the_whole_context(window):
    entries = {**GGUF, "llama.attention.sliding_window": window}
    assert config_from_gguf(entries, UNTIED) == config_from_gguf(GGUF, UNTIED)


def test_gguf_of_smollm2_is_the_preset(smollm2):
    preset = PRESETS["smollm2-135m"]
    assert smollm2.config.rms_norm_eps == pytest.approx(preset.rms_norm_eps, rel=1e-7)
    assert dataclasses.replace(smollm2.config, rms_norm_eps=preset.rms_norm_eps) == preset


def test_what_an_architecture_of_gguf_has():
    plain = config_from_gguf(GGUF, UNTIED)
    biased = dataclasses.replace(plain, qkv_bias=True)
    assert config_from_gguf(gguf_of("qwen2"), UNTIED) == biased
    normed = dataclasses.replace(plain, qk_norm=True, head_dim=64)
    lengths = {"attention__key_length": 64, "attention__value_length": 64}
    entries = gguf_of("qwen3", rope__dimension_count=64, **lengths)
    assert config_from_gguf(entries, UNTIED) == normed
    assert config_from_gguf(entries, ()) == dataclasses.replace(normed, tie_embeddings=True)


def test_biases_are_there_if_their_tensors_are():
    plain = config_from_gguf(GGUF, UNTIED)
    for tensor, field in (
        ("attn_q", "qkv_bias"),
        ("attn_output", "o_bias"),
        ("ffn_gate", "mlp_bias"),
    ):
        got = config_from_gguf(GGUF, {*UNTIED, f"blk.0.{tensor}.bias"})
        assert got == dataclasses.replace(plain, **{field: True})


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_window_of_gguf_is_that_of_all_layers(architecture):
    entries = gguf_of(architecture, attention__sliding_window=4096)
    assert config_from_gguf(entries, UNTIED).sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear"}, None),
        ({"factor": 0.0, "finetuned": False}, None),
        ({"type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        ({"factor": 4.0}, LinearScaling(4.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32768},
            YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1),
        ),
        (
            {"type": "yarn", "factor": 2.0, "attn_factor": 0.5, "yarn_beta_fast": 16.0}
            | {"yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0},
            YarnScaling(2.0, 131072, 0.5 * (0.1 * math.log(2) + 1), 16.0, 2.0),
        ),
    ],
)
def test_rope_scalings_of_gguf(changes, scaling):
    entries = gguf_of("qwen2", **{f"rope__scaling__{key}": v for key, v in changes.items()})
    assert config_from_gguf(entries, UNTIED).rope_scaling == scaling


def test_the_old_key_of_linear_scaling():
    assert config_from_gguf(gguf_of("llama", rope__scale_linear=2.0), UNTIED) == (
        config_from_gguf(gguf_of("llama", rope__scaling__factor=2.0), UNTIED)
    )


@pytest.mark.parametrize("original", [8192, 4096])
def test_divisors_of_a_file_are_kept(original):
    """Llama 3.1's come as a table alone, in float32, whatever they were computed from."""
    config = PRESETS["llama-3.1-8b"]
    scaling = dataclasses.replace(config.rope_scaling, original_max_position=original)
    config = dataclasses.replace(config, rope_scaling=scaling)
    plain = inverse_frequencies(PRESETS["llama-3-8b"])
    divisors = np.array(scaling.divisors(plain.tolist(), 500_000.0), np.float32)
    got = inverse_frequencies(config_from_gguf(GGUF, UNTIED, divisors))
    np.testing.assert_allclose(got, inverse_frequencies(config), rtol=1e-7)
    np.testing.assert_array_equal(got, plain / divisors)


def test_divisors_that_fit_no_head_are_refused():
    ones = np.ones(64, np.float32)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: got \(32,\) divisors .*expected 64"):
        config_from_gguf(GGUF, UNTIED, ones[:32])
    with pytest.raises(ValueError, match=r"beside LinearScaling\(factor=2\.0\), expected 64"):
        config_from_gguf(gguf_of("llama", rope__scaling__factor=2.0), UNTIED, ones)
    with pytest.raises(ValueError, match=r"RoPE frequency: got 0\.0, expected a positive number"):
        config_from_gguf(GGUF, UNTIED, ones * 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "gemma3"},
            "got 'gemma3', expected 'llama' or 'qwen2' or 'qwen3'",
        ),
        ({"general.architecture": None}, "general.architecture: got None"),
        ({"llama.expert_count": 8}, "llama.expert_count: got 8, expected 0"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type: got 'longrope', expected 'none'"),
        ({"llama.rope.scaling.yarn_attn_factor": 1.0}, "yarn_attn_factor: got 1.0, expected no"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier: got 0.1"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor: got 2.0, expected yarn's"),
        ({"llama.rope.scaling.factor": -2.0}, "llama.rope.scaling.factor: got -2.0"),
        ({"llama.attention.sliding_window": -1}, "llama.attention.sliding_window: got -1"),
        ({"llama.attention.sliding_window_pattern": 2}, "sliding_window_pattern: got 2, expected"),
        ({"llama.logit_scale": 0.1}, "llama.logit_scale: got 0.1, expected no such key"),
        ({"llama.rope.dimension_count": 64}, "dimension_count: got 64, expected head dim 128"),
        ({"llama.attention.value_length": 64}, "value_length: got 64"),
        ({"llama.block_count": None}, "llama.block_count: got nothing"),
        ({"llama.attention.head_count": [32] * 32}, "heads, expected a divisor"),
        ({"llama.attention.head_count_kv": [8] * 32}, "num_kv_heads: got"),
    ],
)
def test_gguf_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_gguf({**GGUF, **changes}, UNTIED)
