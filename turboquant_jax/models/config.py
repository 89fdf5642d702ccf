"""What defines a Llama-family decoder: its sizes, its position encoding, its stop tokens."""

import dataclasses
import sys


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule for slowing the low RoPE frequencies; see `rope.scaling_factors`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        for name, value in vars(self).items():
            _require_positive(name, value)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: got {self.low_freq_factor}, "
                f"expected less than high_freq_factor = {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder with RMSNorm, RoPE, grouped-query attention, a SiLU-gated network and no biases.

    Sizes are in channels, `max_position` in tokens. Hashable, so it may be static under `jax.jit`.
    Raises ValueError for sizes that do not fit together.
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
    rope_scaling: Llama3Scaling | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in _SIZES:
            _require_positive(name, getattr(self, name), whole=True)
        for name in ("rope_theta", "rms_norm_eps"):
            _require_positive(name, getattr(self, name))
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


def _require_positive(name: str, value: object, *, whole: bool = False) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= sys.float_info.max):  # type: ignore[operator]
        kind = "integer" if whole else "number"
        raise ValueError(f"{name}: got {value!r}, expected a positive {kind}")


def parameter_count(config: LlamaConfig) -> int:
    """Numbers stored by the decoder; a tied vocabulary matrix counts once."""
    dim, ffn = config.hidden_size, config.intermediate_size
    attention = 2 * dim * config.head_dim * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * dim * ffn + 2 * dim
    matrices = 1 if config.tie_embeddings else 2
    return matrices * config.vocab_size * dim + config.num_layers * layer + dim
