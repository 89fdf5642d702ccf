"""Options of programs that run longer than they compile, which `conftest` would leave slow."""

FULL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
