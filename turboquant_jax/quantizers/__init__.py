"""Vectors to codes and back: rotation, levels, scales, packing, sketches, and their theory."""
