"""A text token by token through the captured step of a torch cache; imports torch."""

from typing import Any

import numpy as np
import torch

from experiments.fidelity.pytorch_greedy import FIRST
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch import supported
from turboquant_jax.pytorch.huggingface import TurboQuantCache


@torch.no_grad()
def losses(model: Any, config: CacheConfig, texts: np.ndarray, fuse: bool) -> dict[str, np.ndarray]:
    """Of every predicted token of texts [B, T]: float64 [B, T - 1] each.

    `nll` with the cache and `full` without one, nats; `kl` between the two; whether they `agree`
    about the most likely token.
    """
    tokens = torch.from_numpy(texts).to(model.device, torch.long)
    exact = _exact(model, tokens)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache.from_model(model, config=config, capacity=tokens.shape[1])
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("nll", "full", "kl", "agrees")}

    def compare(logits: torch.Tensor, first: int) -> None:
        """Logits [B, n, V] after tokens `first` on."""
        last = first + logits.shape[1]
        own = logits.float().log_softmax(dim=-1)
        full = model.lm_head(exact[:, first:last]).float().log_softmax(dim=-1)
        target = tokens[:, first + 1 : last + 1, None]
        found["nll"].append(-own.gather(2, target)[..., 0])
        found["full"].append(-full.gather(2, target)[..., 0])
        found["kl"].append((full.exp() * (full - own)).sum(dim=-1))
        found["agrees"].append(own.argmax(dim=-1) == full.argmax(dim=-1))

    begin = min(FIRST, config.window, tokens.shape[1] - 1)
    compare(model(tokens[:, :begin], use_cache=True, **{supported.CACHE: cache}).logits, 0)
    step = cache.capture(model, fuse=fuse)
    for place in range(begin, tokens.shape[1] - 1):
        compare(step(tokens[:, place : place + 1]), place)
    return {k: torch.cat(v, dim=1).double().cpu().numpy() for k, v in found.items()}


def _exact(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Final hidden vectors [B, T, D] by attention in full precision, text by text."""
    model.set_attn_implementation("sdpa")
    some = [model.base_model(row[None], use_cache=False).last_hidden_state for row in tokens]
    return torch.cat(some)
