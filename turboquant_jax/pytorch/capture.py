"""A decode step of a whole model as a CUDA graph over a `TurboQuantCache`.

    with cache.capture(model):
        model.generate(**inputs, cache=cache)

Single tokens are replayed from two graphs: one for steps in which no sequence completes a block,
one that also compresses what is complete. The host knows which, so that it never waits. Prompts and
other caches run as before. On a CPU the same step runs without a graph. The step is
`model.forward`, also one that `torch.compile` made, or that of `fused`.
"""

import functools
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from turboquant_jax.pytorch import fused
from turboquant_jax.pytorch.state import State
from turboquant_jax.pytorch.supported import CACHE

if TYPE_CHECKING:
    from turboquant_jax.pytorch.huggingface import TurboQuantCache

WARM_UP = 2
"""Runs before a graph is captured: kernels are compiled and the allocator finds its sizes."""


class CapturedStep:
    """The step of a model over a cache, between `__enter__` and `__exit__` in its `forward`.

    Attributes:
      fuse: whether the step is that of `fused`, compiled where it runs on a GPU.
      ids, positions: int64 [B, 1], of the tokens of a step.
      counts: int32 [B], how many they are: 1, or 0 while a graph is made, so that nothing changes.
    """

    def __init__(self, cache: "TurboQuantCache", model: Any, fuse: bool = False):
        self.cache, self.model, self.fuse = cache, model, fuse
        self.forward: Callable[..., Any] = model.forward
        self.graphs: dict[bool, tuple[Any, Tensor]] = {}
        self.ids: Tensor | None = None
        self.state: State | None = None

    def __enter__(self) -> "CapturedStep":
        self.before = vars(self.model).get("forward")  # one that was compiled, say
        self.forward = self.model.forward

        @functools.wraps(self.forward)
        def forward(input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if not args and self._serves(input_ids, kwargs):
                assert input_ids is not None
                logits = self(input_ids, kwargs.get("position_ids"))
                return CausalLMOutputWithPast(logits=logits, **{CACHE: self.cache})
            return self.forward(input_ids, *args, **kwargs)

        self.model.forward = forward
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.before is None:
            del self.model.forward  # the class has its own
        else:
            self.model.forward = self.before

    def __call__(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, 1, V] of one token [B, 1] a sequence, which is in the cache then.

        `positions` [B, 1]: of the tokens, those behind all columns unless given.

        Raises:
          ValueError: more sequences or tokens than the cache has room for.
        """
        steps = self.cache.steps
        self._prepare(ids)
        assert self.ids is not None
        self.ids.copy_(ids)
        self.positions.copy_(steps.seen if positions is None else positions)
        completing = steps.completing()
        logits = self._replay(bool(completing))
        steps.advance()
        return logits

    def device_step(self, completing: bool) -> Tensor:
        """What a graph holds: nothing here looks at a value on the device."""
        steps = self.cache.steps
        steps.captured = self.counts
        steps.completes = self.everyone if completing else self.nobody
        try:
            return self._logits()
        finally:
            steps.captured = None

    def _logits(self) -> Tensor:
        assert self.ids is not None
        if self.fuse:
            by = fused.compiled() if self.ids.device.type == "cuda" else fused.Between()
            return fused.step(self.model, self.cache, self.ids, self.positions, by)
        found = self.forward(
            input_ids=self.ids,
            position_ids=self.positions,
            attention_mask=None,
            use_cache=True,
            return_dict=True,
            **{CACHE: self.cache},
        )
        return found.logits

    def _serves(self, ids: Tensor | None, kwargs: dict[str, Any]) -> bool:
        given = kwargs.get(CACHE, kwargs.get("past_key_values"))  # the older name is taken too
        if ids is None or given is not self.cache:
            return False
        plain = not kwargs.get("output_attentions") and not kwargs.get("output_hidden_states")
        return (
            ids.shape[1] == 1
            and plain
            and all(self.cache.steps.lengths)
            and self.cache.batch_size > 0
        )

    def _prepare(self, ids: Tensor) -> None:
        """Buffers of this batch, and graphs anew wherever the cache has other tensors."""
        state = self.cache.room(ids.shape[0], 1, ids.device)
        if self.ids is not None and self.state is state:
            return
        device = state.device
        self.state, self.graphs = state, {}
        self.ids = torch.zeros_like(ids)
        self.positions = torch.zeros_like(ids)
        self.counts = torch.ones(state.batch, dtype=torch.int32, device=device)
        self.everyone = torch.arange(state.batch, device=device)
        self.nobody = self.everyone[:0]

    def _replay(self, completing: bool) -> Tensor:
        assert self.state is not None
        if self.state.device.type != "cuda":
            return self.device_step(completing)
        if completing not in self.graphs:
            self.graphs[completing] = self._captured(completing)
        graph, logits = self.graphs[completing]
        graph.replay()
        return logits.clone()

    def _captured(self, completing: bool) -> tuple[Any, Tensor]:
        self.counts.zero_()  # nothing is written, and no length changes
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.device_step(completing)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.device_step(completing)
        self.counts.fill_(1)
        return graph, logits
