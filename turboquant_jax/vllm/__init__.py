"""An attention backend for vLLM 0.26, chosen as `CUSTOM`; `register` is its plugin."""

SERVED = "0.26."
"""Versions of vLLM."""


def register() -> None:
    """Make the backend known to vLLM, which calls this in every process (`vllm.general_plugins`).

    Raises:
      ImportError: another version of vLLM than is served.
    """
    import vllm
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not vllm.__version__.startswith(SERVED):
        raise ImportError(f"vllm: got {vllm.__version__}, expected {SERVED}x")
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
