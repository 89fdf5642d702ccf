"""Published configurations, from the `config.json` of each release."""

import dataclasses

from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.rope_scaling import Llama3Scaling

_LLAMA_2_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position=4096,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    bos_id=1,
    eos_ids=(2,),
)
_LLAMA_2_13B = dataclasses.replace(
    _LLAMA_2_7B,
    hidden_size=5120,
    intermediate_size=13_824,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
)
_LLAMA_2_70B = dataclasses.replace(
    _LLAMA_2_7B,
    hidden_size=8192,
    intermediate_size=28_672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
)
_LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=8192,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    bos_id=128_000,
    eos_ids=(128_001, 128_009),
)
_LLAMA_3_70B = dataclasses.replace(
    _LLAMA_3_8B, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
)
_LLAMA_3_1_8B = dataclasses.replace(
    _LLAMA_3_8B,
    max_position=131_072,
    rope_scaling=Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    ),
    eos_ids=(128_001, 128_008, 128_009),
)
_LLAMA_3_1_70B = dataclasses.replace(
    _LLAMA_3_1_8B, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
)
_LLAMA_3_2_3B = dataclasses.replace(
    _LLAMA_3_1_8B,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=28,
    num_heads=24,
    rope_scaling=Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    ),
    tie_embeddings=True,
)
_LLAMA_3_2_1B = dataclasses.replace(
    _LLAMA_3_2_3B, hidden_size=2048, num_layers=16, num_heads=32, head_dim=64
)
_MISTRAL_7B_V0_3 = dataclasses.replace(
    _LLAMA_3_8B,
    vocab_size=32_768,
    max_position=32_768,
    rope_theta=1_000_000.0,
    bos_id=1,
    eos_ids=(2,),
)
_MISTRAL_7B_V0_1 = dataclasses.replace(
    _MISTRAL_7B_V0_3, vocab_size=32_000, rope_theta=10_000.0, sliding_window=4096
)
_SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    bos_id=1,
    eos_ids=(2,),
)
_SMOLLM2_360M = dataclasses.replace(
    _SMOLLM2_135M,
    hidden_size=960,
    intermediate_size=2560,
    num_layers=32,
    num_heads=15,
    num_kv_heads=5,
)
_SMOLLM2_1_7B = dataclasses.replace(
    _SMOLLM2_135M,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    rope_theta=130_000.0,
)
_TINYLLAMA_1_1B = dataclasses.replace(
    _LLAMA_2_7B,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_kv_heads=4,
    head_dim=64,
    max_position=2048,
)
_QWEN2_5_0_5B = LlamaConfig(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    max_position=32_768,
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
    bos_id=151_643,
    eos_ids=(151_645, 151_643),
    qkv_bias=True,
)
_QWEN2_5_1_5B = dataclasses.replace(
    _QWEN2_5_0_5B,
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    head_dim=128,
)
_QWEN2_5_7B = dataclasses.replace(
    _QWEN2_5_1_5B,
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_heads=28,
    num_kv_heads=4,
    tie_embeddings=False,
)
_QWEN2_5_32B = dataclasses.replace(
    _QWEN2_5_7B,
    hidden_size=5120,
    intermediate_size=27_648,
    num_layers=64,
    num_heads=40,
    num_kv_heads=8,
)
_QWEN3_0_6B = dataclasses.replace(
    _QWEN2_5_1_5B,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    max_position=40_960,
    qkv_bias=False,
    qk_norm=True,
)
_QWEN3_4B = dataclasses.replace(
    _QWEN3_0_6B, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32
)
_QWEN3_8B = dataclasses.replace(
    _QWEN3_4B, hidden_size=4096, intermediate_size=12_288, tie_embeddings=False
)
_QWEN3_32B = dataclasses.replace(
    _QWEN3_8B, hidden_size=5120, intermediate_size=25_600, num_layers=64, num_heads=64
)

PRESETS: dict[str, LlamaConfig] = {
    "llama-2-7b": _LLAMA_2_7B,
    "llama-2-13b": _LLAMA_2_13B,
    "llama-2-70b": _LLAMA_2_70B,
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "llama-3.1-70b": _LLAMA_3_1_70B,
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "llama-3.2-3b": _LLAMA_3_2_3B,
    "llama-3.3-70b": _LLAMA_3_1_70B,
    "mistral-7b": _MISTRAL_7B_V0_3,
    "mistral-7b-v0.1": _MISTRAL_7B_V0_1,
    "mistral-7b-v0.3": _MISTRAL_7B_V0_3,
    "qwen2.5-0.5b": _QWEN2_5_0_5B,
    "qwen2.5-1.5b": _QWEN2_5_1_5B,
    "qwen2.5-7b": _QWEN2_5_7B,
    "qwen2.5-32b": _QWEN2_5_32B,
    "qwen3-0.6b": _QWEN3_0_6B,
    "qwen3-4b": _QWEN3_4B,
    "qwen3-8b": _QWEN3_8B,
    "qwen3-32b": _QWEN3_32B,
    "smollm2-135m": _SMOLLM2_135M,
    "smollm2-360m": _SMOLLM2_360M,
    "smollm2-1.7b": _SMOLLM2_1_7B,
    "tinyllama-1.1b": _TINYLLAMA_1_1B,
}
"""Instruction-tuned releases where there are several; mistral-7b is v0.3.

Of the Mistrals only v0.1 has a sliding window.
"""
