"""The second group of layers that vLLM 0.26 keeps for windows: one beside each of ours.

It has pages and a block table, and no attention of its own: what it says of a step is added to the
step of our layers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from turboquant_jax.vllm import raw
from turboquant_jax.vllm.windowed import WindowedSteps


class WindowBackend(AttentionBackend):
    """Pages of raw tokens, which the layers of `TurboQuantBackend` read and write."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """As in a registry, which it is not part of."""
        return "TURBOQUANT_WINDOW"

    @staticmethod
    def get_supported_kernel_block_sizes() -> list:
        """All: those of its spec."""
        return [8, 16, 32, 64]

    @staticmethod
    def get_impl_cls() -> Any:
        """None: it is never called."""
        raise NotImplementedError("get_impl_cls: got a window, expected a layer with attention")

    @staticmethod
    def get_builder_cls() -> type["WindowBuilder"]:
        """Metadata of a step."""
        return WindowBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """As large as its tokens, pages first; where they lie in a page is ours to say."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size


class WindowLayer(AttentionLayerBase):
    """The window of a layer, as vLLM counts layers."""

    def __init__(self, impl: Any):
        self.impl = impl
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Of its group."""
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlidingWindowSpec:
        """Raw tokens in pages of the bytes that the codes of a block take.

        What is in front of the window may be as much as a block that is not yet full.
        """
        shared, dtype = self.impl.shared, self.impl.open[0].dtype
        config = shared.config
        return SlidingWindowSpec(
            block_size=raw.tokens_of(config, shared.codecs, dtype),
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_dim,
            head_size_v=config.head_dim,
            dtype=dtype,
            sliding_window=config.window + config.block,
            page_size_padded=config.block * config.num_kv_heads * shared.token_bytes,
        )


def add_layer(impl: Any) -> None:
    """Beside the layer of this attention, before vLLM asks layers for their pages."""
    layers = impl.vllm_config.compilation_config.static_forward_context
    (name,) = [name for name, own in layers.items() if getattr(own, "impl", None) is impl]
    layers[f"{name}.window"] = WindowLayer(impl)


@dataclass
class WindowMetadata(AttentionMetadata):
    """Nothing: see `WindowBuilder`."""


class WindowBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Adds its pages to the metadata of our layers, whose group comes before."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, kv_cache_spec, layer_names, vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> WindowMetadata:
        """The step of our layers, which has none yet, gets its window."""
        from turboquant_jax.vllm.backend import TurboQuantBackend

        own, common = TurboQuantBackend.latest, common_attn_metadata
        assert own is not None and own.metadata is not None and own.metadata.batch.window is None
        assert isinstance(own.steps, WindowedSteps)
        count = common.num_reqs
        table, seen = common.block_table_tensor[:count], common.seq_lens[:count]
        own.metadata.batch = own.steps.with_window(own.metadata.batch, table, seen)
        return WindowMetadata()
