"""Experiments on time and memory; most need a GPU."""
