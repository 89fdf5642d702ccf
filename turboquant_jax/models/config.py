"""What defines a decoder: its sizes, its position encoding, its stop tokens, its architecture."""

import dataclasses

from turboquant_jax.models.rope_scaling import RopeScaling, require_positive


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder with RMSNorm, RoPE, grouped-query attention and a SiLU-gated network.

    Llama's architecture unless the last block of fields says otherwise: models differ in data, not
    in code. Sizes are in channels, `max_position` in tokens. Hashable, so it may be static under
    `jax.jit`. Raises ValueError for sizes that do not fit together.

    Attributes:
      qkv_bias, o_bias, mlp_bias: which projections have biases; `mlp_bias` is of all three.
      qk_norm: queries and keys of every head pass an RMSNorm before RoPE (Qwen3).
      sliding_window: tokens that a query sees in every layer, itself included; None = all.
      attention_scale: multiplies <q, k>; None = head_dim**-0.5.
      attention_softcap, logit_softcap: c in c tanh(x / c), of scores and of the final logits.
      rotary_dim: channels of a head that RoPE turns, the first ones; None = all.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    # the architecture
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    rotary_dim: int | None = None

    def __post_init__(self):
        for name in _SIZES:
            require_positive(name, getattr(self, name), whole=True)
        for name in ("rope_theta", "rms_norm_eps"):
            require_positive(name, getattr(self, name))
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        for name in ("sliding_window", "rotary_dim"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name), whole=True)
        for token in (*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"bos_id, eos_ids: got {token!r}, expected integers below {self.vocab_size}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}, expected a multiple of "
                f"num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number for RoPE")
        if self.rotated_channels % 2 or self.rotated_channels > self.head_dim:
            raise ValueError(
                f"rotary_dim: got {self.rotary_dim}, expected an even number up to "
                f"head_dim = {self.head_dim}"
            )

    @property
    def rotated_channels(self) -> int:
        """R, the channels of a head that RoPE turns."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position",
)


def parameter_count(config: LlamaConfig) -> int:
    """Numbers stored by the decoder; a tied vocabulary matrix counts once."""
    dim, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    attention = 2 * dim * head * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * dim * ffn + 2 * dim
    layer += config.qkv_bias * head * (config.num_heads + 2 * config.num_kv_heads)
    layer += config.o_bias * dim + config.mlp_bias * (2 * ffn + dim) + config.qk_norm * 2 * head
    matrices = 1 if config.tie_embeddings else 2
    return matrices * config.vocab_size * dim + config.num_layers * layer + dim
