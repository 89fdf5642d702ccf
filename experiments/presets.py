"""The settings that answer questions and look for needles: ours, the paper's, and peers'."""

from dataclasses import replace

from experiments.settings import Setting, peers, turbo


def asked(layers: int) -> list[Setting]:
    """Ours, then what others do, then the paper's cache without remedies."""
    held = {setting.preset: setting for setting in peers(layers)}
    return [
        replace(turbo(3, 3, "trellis", window=128), preset="balanced (K3 V3 trellis w128)"),
        replace(turbo(2, 2, "trellis", window=128), preset="max (K2 V2 trellis w128)"),
        replace(turbo(4, 4, "trellis", window=128), preset="lossless (K4 V4 trellis w128)"),
        replace(turbo(3, 2, "trellis", window=128), preset="compact (K3 V2 trellis w128)"),
        held["KIVI int2"],
        held["vLLM 3bit_nc"],
        replace(turbo(4, 4, window=0, sinks=0, centred=False), preset="plain 4 bits"),
        replace(turbo(2, 2, window=0, sinks=0, centred=False), preset="plain 2 bits"),
    ]
