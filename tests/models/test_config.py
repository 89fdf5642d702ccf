"""Sizes against those of the releases; what does not fit together is refused."""

import dataclasses

import pytest

from turboquant_jax.models.config import parameter_count
from turboquant_jax.models.presets import PRESETS
from turboquant_jax.models.rope_scaling import Llama3Scaling

# Of the published safetensors (the tied matrix counted once).
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
}


def test_parameter_counts_are_the_published_ones():
    assert {name: parameter_count(config) for name, config in PRESETS.items()} == PUBLISHED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: got 0, expected a positive integer"),
        ({"hidden_size": 2.5}, "hidden_size: got 2.5"),
        ({"vocab_size": True}, "vocab_size: got True"),
        ({"rope_theta": -1.0}, "rope_theta: got -1.0, expected a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta: got inf"),
        ({"rope_theta": 10**400}, "rope_theta: got 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: got '1e-5'"),
        ({"num_kv_heads": 3}, "num_heads: got 4, expected a multiple of num_kv_heads = 3"),
        ({"eos_ids": (97,)}, "eos_ids: got 97, expected integers below 97"),
        ({"head_dim": 7}, "head_dim: got 7, expected an even number"),
        ({"sliding_window": 0}, "sliding_window: got 0, expected a positive integer"),
        ({"rotary_dim": 14}, "rotary_dim: got 14, expected an even number up to head_dim = 12"),
        ({"rotary_dim": 5}, "rotary_dim: got 5, expected an even number"),
        ({"attention_softcap": -1.0}, "attention_softcap: got -1.0, expected a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config, **changes)


def test_scaling_without_an_order_is_refused():
    with pytest.raises(ValueError, match="expected less than high_freq_factor"):
        Llama3Scaling(8.0, 4.0, 4.0, 8192)
