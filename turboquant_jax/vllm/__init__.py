"""An attention backend for vLLM 0.26, chosen as `CUSTOM`; `register` is its plugin."""

import logging

SERVED = "0.26."
"""Versions of vLLM."""


def register() -> None:
    """Make the backend known to vLLM, which calls this in every process (`vllm.general_plugins`).

    Another version of vLLM is left as it is, with a warning: it calls this whatever backend was
    asked for, and refuses `CUSTOM` itself where nothing has registered one.
    """
    import vllm

    if not vllm.__version__.startswith(SERVED):
        logging.getLogger(__name__).warning(
            "turboquant-jax: no backend for vllm %s, only for %sx", vllm.__version__, SERVED
        )
        return
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    name = f"{__name__}.backend.TurboQuantBackend"
    register_backend(AttentionBackendEnum.CUSTOM, name)
    theirs = Attention.get_kv_cache_spec
    if getattr(theirs, "of_turboquant", False):
        return

    def get_kv_cache_spec(self, vllm_config):
        """Our pages for our layers: 0.26 has no other place to say how large a page is."""
        from turboquant_jax.vllm import backend

        if issubclass(self.attn_backend, backend.TurboQuantBackend):
            return backend.kv_cache_spec(self, vllm_config)
        return theirs(self, vllm_config)

    get_kv_cache_spec.of_turboquant = True  # type: ignore[attr-defined]
    Attention.get_kv_cache_spec = get_kv_cache_spec
