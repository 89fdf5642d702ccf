"""Numbers that say what the kernels serve, known without JAX."""

# Tokens of a page.
PAGE_TOKENS = (32, 64, 128)
# Query heads of a kv head.
MAX_HEADS = 32
# Of as many the registers hold the products with a mean that turns, too.
MAX_TURNED_HEADS = 16
# Tokens of a sequence that decoding attends for in one pass: those of a draft.
MAX_QUERIES = 8
# Formats of the heads of one call of decoding: each is a loop of its own in the kernel.
MAX_FORMATS = 4
