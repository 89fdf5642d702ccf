"""The same kernels and the same cache from PyTorch: needs the extra `torch`.

Nothing else in the library imports torch, and with launch plans at hand nothing here imports jax.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same name for type checkers
    from turboquant_jax.pytorch.huggingface import TurboQuantCache
else:
    from turboquant_jax import lazy

    __getattr__, __dir__ = lazy.names(
        __name__, {"TurboQuantCache": (f"{__name__}.huggingface", "TurboQuantCache")}
    )

__all__ = ["TurboQuantCache"]
