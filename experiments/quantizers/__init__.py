"""Experiments on vectors: errors, biases, rotations, scales, codebooks."""
