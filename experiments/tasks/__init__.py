"""Experiments on answers through a compressed cache: needles and questions."""
