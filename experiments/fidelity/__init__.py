"""Experiments on what a compressed cache does to a language model's predictions."""
