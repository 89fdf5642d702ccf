"""Options of programs that `conftest` would not compile as users do."""

# where a test looks at what XLA made: its copies, its memory, its collectives
EVERY_PASS = {"xla_disable_hlo_passes": ""}

# of programs that run longer than they compile
FULL = EVERY_PASS | {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
