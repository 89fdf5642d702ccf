"""The table of angles by which a mean before RoPE is turned within a period of tokens."""

# Tokens of a period.
PERIOD = 64
# What stands for a cosine of 1 in the table: it is one of bytes.
STEPS = 127
