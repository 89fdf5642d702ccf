"""Names that flags take, known without the library that serves them; a test compares the two."""

PRESETS = ("lossless", "balanced", "compact", "max")
CENTRINGS = ("pre_rope", "stored", "none")
ROTATIONS = ("haar", "hadamard", "block_hadamard", "identity")
NGRAM = "ngram"
"""Drafts by prompt look-up."""
MODEL = "model"
"""Drafts by a second model."""
DRAFTED = 4
"""Tokens of a draft, unless said."""
FULL = 16
"""Bits of a cache in full precision."""
_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
DTYPES = ("float32", "bfloat16")


def dtype(name: str) -> str:
    """The dtype of weights; ValueError for one that is not computed in."""
    if name.lower() not in _DTYPES:
        expected = f"expected {' or '.join(DTYPES)}"
        of_files = "; files of float16 are read, and converted to it" if "16" in name else ""
        raise ValueError(f"--dtype: got {name}, {expected}{of_files}")
    return _DTYPES[name.lower()]
