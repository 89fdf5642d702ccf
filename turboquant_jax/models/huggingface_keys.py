"""The keys of a `config.json` of Hugging Face that are known here, and what they may hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_OFF = (None, False)
_EITHER = (None, False, True)


@dataclass(frozen=True)
class ModelType:
    """What a `model_type` means beside what its `config.json` says, as in transformers' code.

    Attributes:
      served: keys that change the computation of this type, and the only values served.
      defaults: of absent keys, those of its configuration class.
      qkv_bias, qk_norm: there without a key that says so.
      o_bias: whether `attention_bias` is also the output's.
      window: the key that says whether `sliding_window` holds, the window itself, or none.
    """

    served: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any]
    qkv_bias: bool = False
    o_bias: bool = True
    qk_norm: bool = False
    window: str | None = None


def _served(name: str, **keys: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    plain = {"attention_bias": _OFF, "mlp_bias": _OFF, "use_sliding_window": _OFF}
    return {"architectures": (None, [name + "ForCausalLM"]), **plain, **keys}


_EPSILON = {"rms_norm_eps": 1e-6}
_LLAMA = {**_EPSILON, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {
    **_EPSILON,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

MODEL_TYPES = {
    "llama": ModelType(_served("Llama", attention_bias=_EITHER, mlp_bias=_EITHER), _LLAMA),
    "mistral": ModelType(
        _served("Mistral"),
        {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
        window="sliding_window",
    ),
    "qwen2": ModelType(
        _served("Qwen2", attention_bias=(None, True), use_sliding_window=_EITHER),
        _QWEN,
        qkv_bias=True,
        o_bias=False,
        window="use_sliding_window",
    ),
    "qwen3": ModelType(
        _served("Qwen3", attention_bias=_EITHER, use_sliding_window=_EITHER),
        {**_QWEN, "head_dim": 128},
        qk_norm=True,
        window="use_sliding_window",
    ),
}
"""The architectures that are served, by the name that `config.json` has for them."""

HF_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""The kinds of RoPE that are served, and their keys."""

# Keys that change the computation of every type, and the only values served.
HF_SERVED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(MODEL_TYPES),
    "hidden_act": ("silu",),
    "use_mrope": _OFF,
    "pruned_heads": (None, {}),
    "tie_encoder_decoder": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "is_decoder": (None, True, False),
    "tie_word_embeddings": (None, True, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}

HF_READ = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "sliding_window",
    "layer_types",
    "max_window_layers",
}

# Keys of training, bookkeeping, generation and storage: the logits do not depend on them.
HF_NEUTRAL = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}
