"""The architectures of GGUF that are served, and the keys of their metadata, as in llama.cpp."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GGUFArchitecture:
    """What a `general.architecture` means beside what the metadata say.

    Attributes:
      interleaved: the converter moved channels 2i and 2i+1 of a query or key next to each other,
        for a RoPE of adjacent pairs; otherwise they lie as in the original model.
      rope_divisors: the divisors of RoPE's frequencies may be a tensor, `rope_freqs.weight`.
      qkv_bias, qk_norm: there in every file; other biases are there if their tensors are.
    """

    interleaved: bool = False
    rope_divisors: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": GGUFArchitecture(interleaved=True, rope_divisors=True),  # Mistral comes as this too
    "qwen2": GGUFArchitecture(qkv_bias=True),
    "qwen3": GGUFArchitecture(qk_norm=True),
}
"""The architectures that are served, by the name that GGUF has for them."""

ROPE_SCALINGS = ("none", "linear", "yarn")
"""The values of `rope.scaling.type` that are served."""

# Keys that change the computation, and the only values served.
GGUF_SERVED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ROPE_SCALINGS,
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}

GGUF_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
}


def architecture_of(metadata: Mapping[str, Any]) -> tuple[str, GGUFArchitecture]:
    """Name and meaning of the file's architecture; ValueError for one that is not served."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        served = " or ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"general.architecture: got {name!r}, expected {served}")
    return name, ARCHITECTURES[name]
