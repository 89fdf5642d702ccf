"""Published Llama-family configurations, from the `config.json` of each release."""

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
    "smollm2-135m": _SMOLLM2_135M,
    "smollm2-360m": _SMOLLM2_360M,
    "smollm2-1.7b": _SMOLLM2_1_7B,
    "tinyllama-1.1b": _TINYLLAMA_1_1B,
}
"""Instruction-tuned releases where there are several; mistral-7b is v0.3 (no sliding window)."""
