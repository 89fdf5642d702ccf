"""The compressed cache in the place of transformers' `DynamicCache`.

    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache.from_model(model, preset="lossless")
    model.generate(**inputs, cache=cache)  # past_key_values before transformers 5.24

transformers hands a layer's new keys, after RoPE, and values to `update`, and what that returns to
the attention function, which never sees the cache. So `update` returns no tensors but a `Pending`,
by which the attention function finds its layer: it attends, then writes. The mask that it gets is
that of the new tokens, [B, T]: tokens of padding are not stored.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.presets import Preset
from turboquant_jax.pytorch import capture, creation, fused, sharing, step, supported
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import State

NAME = "turboquant"
"""Of the attention implementation."""


class TurboQuantLayer(CacheLayerMixin):
    """One layer of a `TurboQuantCache`, which holds the tokens of all layers."""

    is_compileable = False
    is_croppable = False  # not always: see `TurboQuantCache.crop`
    supports_early_init = False

    def __init__(self, cache: "TurboQuantCache", index: int):
        super().__init__()
        self.cache, self.index, self.is_initialized = cache, index, True

    @property
    def is_sliding(self) -> bool:
        """Whether queries of this layer see a sliding window."""
        return self.cache.config.sliding_window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the tokens' tensors are made with the first of them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        """What the attention function is to attend to and to write."""
        pending = Pending(self, key_states, value_states)
        return pending, pending

    def get_seq_length(self) -> int:
        """Columns of the batch that went by, padding included."""
        return self.cache.steps.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns of a mask, and the first of them; of new tokens by number, or by their places."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.cache.steps.seen + new, 0

    def get_max_length(self) -> int:
        """Most tokens of a sequence; -1 where the cache grows."""
        return -1 if self.cache.capacity is None else self.cache.capacity

    get_max_cache_shape = get_max_length  # its name in the first releases of transformers 5

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a layer of a TurboQuantCache: got an operation, expected it of "
                                  "the whole cache, whose layers share their pages")  # fmt: skip

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _whole
    offload = prefetch = _whole


@dataclass(frozen=True)
class Pending:
    """New keys and values [B, K, T, H] on their way through a layer's attention."""

    layer: TurboQuantLayer
    keys: Tensor
    values: Tensor

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_other_attention(name))

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any) -> Any:
        """Who hands it to torch takes it for a tensor."""
        raise AttributeError(_other_attention(getattr(function, "__name__", str(function))))


def _other_attention(asked: str) -> str:
    return (
        f"attention implementation: got one that asks keys for {asked!r}, expected {NAME!r}: "
        f"call model.set_attn_implementation({NAME!r}) before the cache is used"
    )


class TurboQuantCache(Cache):
    """A compressed cache for one model: made with `from_model`, given as `cache`.

    Attributes:
      config: bits, window, sinks and the rest.
      capacity: most tokens of a sequence, or None where the cache grows as it needs.
      state: the tensors, once there are tokens; None before.
      steps: what the host knows of the sequences.
    """

    def __init__(self, model: Any, config: CacheConfig, capacity: int | None, seed: int):
        self.config, self.capacity, self.seed = config, capacity, seed
        self.state: State | None = None
        self.steps = step.Steps(config)
        self.modules = supported.attention_modules(model)
        super().__init__(layers=[TurboQuantLayer(self, i) for i in range(config.num_layers)])

    @classmethod
    def from_model(
        cls,
        model: Any,
        preset: Preset = "lossless",
        *,
        config: CacheConfig | None = None,
        capacity: int | None = None,
        seed: int = 0,
    ) -> "TurboQuantCache":
        """An empty cache for a model.

        Args:
          model: of transformers: Llama, Qwen2, Qwen3 or Mistral.
          preset: see `turboquant_jax.cache.presets`.
          config: in the place of the preset; `supported.cache_config(model, ...)` makes one, and
            `dataclasses.replace` changes it.
          capacity: most tokens of a sequence; the cache grows as it needs unless given.
          seed: of the rotations.

        Raises:
          ValueError: a model, dtype or configuration that is not served; says which are.
        """
        found = supported.cache_config(model, preset) if config is None else config
        supported.check_config(model, found)
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity: got {capacity}, expected at least 1 token, or None")
        return cls(model, found, capacity, seed)

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 while there are none."""
        return -1 if self.state is None else self.state.batch

    @property
    def is_initialized(self) -> bool:
        """Whether there are tensors."""
        return self.state is not None

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of the cache."""
        return 0 if self.state is None else self.state.nbytes

    def attend(self, layer: int, heads: tuple, mask: Tensor | None, scores: Scores, sink_logits):
        """Attention of new tokens [B, T, heads, H] of a layer, which then are in the cache."""
        if layer == 0:
            count, device = heads[1].shape[1], heads[1].device
            if self.steps.captured is None:
                self.room(heads[1].shape[0], count, device)
            assert self.state is not None
            self.steps.begin(self.state, count, mask)
        assert self.state is not None
        return self.steps.layer(self.state, layer, heads, scores, sink_logits)

    def room(self, batch: int, count: int, device: torch.device) -> State:
        """The tensors, with room for `count` more tokens of each of `batch` sequences.

        Raises:
          ValueError: another batch than the cache has tokens of, or more tokens than its capacity.
        """
        if self.state is not None and self.state.batch != batch:
            if self.steps.seen:
                raise ValueError(
                    f"batch: got {batch} sequences, expected the cache's {self.state.batch}; "
                    "reset() it, or batch_repeat_interleave"
                )
            self.state = None
        needed = self.steps.longest + count
        if self.capacity is not None and needed > self.capacity:
            raise ValueError(
                f"capacity: got up to {needed} tokens of a sequence, expected {self.capacity} "
                "at most; from_model(capacity=) sets it"
            )
        if self.state is None:
            room = self.capacity or step.room_for(self.config, needed)
            self.state = creation.create(self.config, batch, room, seed=self.seed, device=device)
            self.steps.start(batch)
        elif needed > self.state.capacity:
            self.state = sharing.grown(self.state, step.room_for(self.config, needed))
        return self.state

    def capture(self, model: Any, *, fuse: bool = False) -> capture.CapturedStep:
        """A context in which the model's single tokens over this cache are a CUDA graph.

        `fuse`: norms, RoPE, residuals and activations as one kernel each, by `torch.compile`; the
        model's layers are not called then, and weights of matrices that read the same vectors are
        put side by side for good: its parameters are views of them.

        Raises:
          ValueError: another model than the cache was made for; to be fused, one without a head.
        """
        if supported.attention_modules(model) != self.modules:
            raise ValueError("model: got another one than the cache was made for")
        if fuse:
            fused.check(model)
            fused.prepare(model)
        return capture.CapturedStep(self, model, fuse)

    def reset(self) -> None:
        """Forget all tokens; tensors are kept for the next ones."""
        if self.state is not None:
            sharing.clear(self.state)
        self.steps.start(self.batch_size)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens of every sequence: -n of them (a negative number).

        Raises:
          ValueError: a positive number, or tokens before which a block would have to be taken back
            that the window no longer holds.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: got {tokens_to_remove}, expected 0 or less: -n removes n tokens"
            )
        if tokens_to_remove and self.state is not None:
            self.steps.crop(self.state, -tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b goes on as sequence beam_idx[b]; blocks are shared."""
        if self.state is not None:
            sharing.reorder(self.state, beam_idx)
            self.steps.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after another."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences, in this order."""
        if self.state is not None:
            self.state = sharing.selected(self.state, indices)
            self.steps.select(indices.tolist())


def attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a `TurboQuantCache`, as transformers calls it; writes the new tokens."""
    if not isinstance(key, Pending):
        raise ValueError(
            f"past_key_values: got none or another cache, expected a TurboQuantCache under the "
            f"attention implementation {NAME!r}: pass TurboQuantCache.from_model(model)"
        )
    cache, layer = key.layer.cache, key.layer.index
    if not torch.compiler.is_compiling():
        supported.check_call(cache, module, layer, dropout, attention_mask)
    heads = tuple(x.transpose(1, 2) for x in (query, key.keys, key.values))
    output = cache.attend(layer, heads, attention_mask, Scores(scaling, softcap), s_aux)
    return output, None


def mask(
    batch_size: int,
    q_length: int | None = None,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Which of the new tokens are none: bool [B, T], or None where all are tokens.

    The first releases of transformers 5 give the places of new tokens instead of their number.
    """
    if use_vmap:
        raise ValueError("mask: got a function of its own, expected causal attention")
    if q_length is None:
        assert cache_position is not None
        q_length = cache_position.shape[0]
    return None if attention_mask is None else attention_mask[:, -q_length:]


def register() -> None:
    """Make `model.set_attn_implementation("turboquant")` known to transformers."""
    supported.check_versions()
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


register()
