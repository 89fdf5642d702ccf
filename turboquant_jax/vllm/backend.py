"""The classes that vLLM 0.26 asks an attention backend for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import TQFullAttentionSpec

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch import codec, constants, pre_rope
from turboquant_jax.pytorch.codec import Codec
from turboquant_jax.pytorch.pre_rope import Phases
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.vllm import pages, raw, settings, windows
from turboquant_jax.vllm.jobs import Batch
from turboquant_jax.vllm.step import Layer
from turboquant_jax.vllm.steps import Steps
from turboquant_jax.vllm.windowed import Windowed, WindowedSteps

SEED = 0
"""Of the rotations: pages of all engines are alike."""


@dataclass(frozen=True, eq=False)
class Shared:
    """What the layers of an engine have in common."""

    config: CacheConfig
    codecs: tuple[Codec, Codec]
    phases: Phases | None
    token_bytes: int


class TurboQuantBackend(AttentionBackend):
    """Pages of compressed blocks; open blocks in full precision beside them.

    Attributes:
      shared: of the engine that was made last, for shapes of memory that vLLM asks the class for.
      latest: builder of the step's metadata, to which that of windows adds.
    """

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto"]
    shared: ClassVar[Shared | None] = None
    latest: ClassVar["TurboQuantBuilder | None"] = None

    @staticmethod
    def get_name() -> str:
        """What vLLM's list of backends calls it."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes() -> list:
        """One size of pages."""
        return [settings.BLOCK]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """No multiples: a page of the engine is a page of the kernels."""
        return block_size in (None, settings.BLOCK)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whole words of the kernels."""
        return head_size % 32 == 0

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """A page is not bytes that follow each other, as a connector would copy them."""
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders."""
        return attn_type == AttentionType.DECODER

    @staticmethod
    def get_impl_cls() -> type["TurboQuantImpl"]:
        """Attention of a layer."""
        return TurboQuantImpl

    @staticmethod
    def get_builder_cls() -> type["TurboQuantBuilder"]:
        """Metadata of a step."""
        return TurboQuantBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Bytes, pages first."""
        shared = TurboQuantBackend.shared
        if shared is None:
            raise RuntimeError("get_kv_cache_shape: got no engine, expected a layer made before")
        return num_blocks, num_kv_heads, block_size, shared.token_bytes


def kv_cache_spec(layer: Any, vllm_config: VllmConfig) -> TQFullAttentionSpec:
    """What vLLM allocates for a layer of this backend: its own spec of pages in bytes."""
    return TQFullAttentionSpec(
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        head_size_v=layer.head_size,
        dtype=torch.uint8,
        tq_slot_size=layer.impl.shared.token_bytes,
    )


@dataclass
class TurboQuantMetadata(AttentionMetadata):
    """A step: tokens that are no padding, its requests, and the layers by number."""

    tokens: int
    batch: Batch
    layers: Sequence[Layer]


class TurboQuantBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    """Metadata from vLLM's; keeps the slots of open blocks."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, kv_cache_spec, layer_names, vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)
        self.count = vllm_config.scheduler_config.max_num_seqs
        self.steps: Steps | None = None
        self.metadata: TurboQuantMetadata | None = None
        TurboQuantBackend.latest = self

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TurboQuantMetadata:
        """Lengths, slots and blocks of a step; the device is not waited for."""
        common = common_attn_metadata
        singles, _, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
        if self.steps is None:
            context = self.vllm_config.compilation_config.static_forward_context
            attention = [context[name] for name in self.layer_names]
            layers = [
                own.impl.layer_over(own.kv_cache, number) for number, own in enumerate(attention)
            ]
            columns = common.block_table_tensor.shape[1]
            kind = WindowedSteps if isinstance(layers[0], Windowed) else Steps
            self.steps = kind(layers, self.count, columns, self.device)
            if layers[0].kernels:
                self.steps.warm_up(attention[0].impl.num_heads, self.vllm_config.model_config.dtype)
        batch = self.steps.batch(
            common.block_table_tensor[: common.num_reqs],
            common.seq_lens[: common.num_reqs],
            common.query_start_loc[: common.num_reqs + 1],
            singles,
            common.query_start_loc_cpu.tolist(),
            common.seq_lens_cpu_upper_bound.tolist(),  # exact without speculation
        )
        self.metadata = TurboQuantMetadata(common.num_actual_tokens, batch, self.steps.layers)
        return self.metadata


class TurboQuantImpl(AttentionImpl[TurboQuantMetadata]):
    """Attention of a layer, whose memory is vLLM's pages and its own open blocks."""

    supports_quant_query_input: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ):
        for name, got in (
            ("alibi_slopes", alibi_slopes),
            ("sliding_window", sliding_window),
            ("logits_soft_cap", logits_soft_cap or None),
            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name),
        ):
            if got is not None:
                raise NotImplementedError(f"{name}: got {got}, expected a layer without")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.scores = Scores(scale)
        self.vllm_config = get_current_vllm_config()
        self.shared = _shared(self.vllm_config)
        self.open: tuple[Tensor, Tensor] | None = None
        self.number = 0
        TurboQuantBackend.shared = self.shared

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Memory of open blocks: before vLLM measures how much is left for pages."""
        config = self.shared.config
        if config.window:
            windows.add_layer(self)
        shape = (
            self.vllm_config.scheduler_config.max_num_seqs + 1,
            0 if config.window else config.block,  # a window has the open block
            config.num_kv_heads,
            config.head_dim,
        )
        device = self.vllm_config.device_config.device
        keys, values = (torch.zeros(shape, dtype=act_dtype, device=device) for _ in range(2))
        self.open = keys, values

    def layer_over(self, kv_cache: Tensor, number: int) -> Layer:
        """This layer, of that number, over vLLM's memory.

        Steps alone keep it: vLLM measures its graphs over other memory, which it gives back.
        """
        assert self.open is not None
        self.number = number
        own = pages.carve(kv_cache, self.shared.config, self.shared.codecs)
        config = self.shared.config
        of = config, self.shared.phases, *self.open, own, kv_cache.device.type == "cuda", number
        if not config.window:
            return Layer(*of)
        return Windowed(*of, raw=raw.over(own, config, self.open[0].dtype))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TurboQuantMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's tokens [tokens, N, H], into `output`."""
        if attn_metadata is None:
            return output.fill_(0)
        count = attn_metadata.tokens
        own = attn_metadata.layers[self.number]
        q, k, v = (x[:count].view(count, -1, self.head_size) for x in (query, key, value))
        found = own.run(q, k, v, attn_metadata.batch, self.scores)
        output[:count] = found.reshape(output[:count].shape)
        return output


_SHARED: list[tuple[VllmConfig, Shared]] = []


def _shared(vllm_config: VllmConfig) -> Shared:
    """One for all layers of an engine."""
    if not _SHARED or _SHARED[0][0] is not vllm_config:
        config = settings.cache_config(vllm_config)
        device = torch.device(vllm_config.device_config.device)
        (pair,) = constants.codecs_of(config, SEED)
        key, value = (codec.create(own, None, None, device) for own in pair)
        longest = vllm_config.model_config.max_model_len
        phases = pre_rope.create(config, longest, device)
        own = Shared(config, (key, value), phases, pages.token_bytes(config, (key, value)))
        _SHARED[:] = [(vllm_config, own)]
    return _SHARED[0][1]
