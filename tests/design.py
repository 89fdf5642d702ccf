"""Options crossed: few settings of a cache and a call in which every pair of choices occurs."""

import numpy as np

from turboquant_jax import cache

FACTORS = {
    "key_bits": (4, 3, 2),
    "value_bits": (4, 3, 2),
    "code": ("scalar", "trellis", "prod"),  # of keys, with a bit more; then values are scalar
    # one; half of the channels, in an order of their own, at one bit less; one scale for all, of
    # other channels in keys, unless they are of prod, and in values
    "groups": ("one", "outliers", "calibrated"),
    "rotations": (("hadamard", "haar"), ("haar", "identity")),  # of keys and of values
    "window": (0, 20),
    "sinks": (0, 3),
    "centring": ("none", "stored", "pre_rope"),
    "sliding_window": (None, 150),
    "softcap": (None, 8.0),
    "sink_logits": (False, True),
    "dtype": ("float32", "bfloat16"),
    "head_dim": (32, 48),
    "group": (1, 3),  # query heads of a kv head
    "paged": (False, True),
    "ragged": (False, True),
}

# of 32 channels: all of a head, or two thirds of it; some turn in a few tokens, some hardly
FREQUENCIES = tuple(float(w) for w in 300.0 ** -(np.arange(16) / 16))


# Of each setting the choices by their numbers, factor by factor: as few rows as annealing found.
CHOICES = """
    0012111000100011
    0021000201011101
    0100111101010110
    0201011010010010
    1000010211101111
    1111101200000010
    1122111111101000
    1220100001010001
    2021110110110010
    2112010001011111
    2202000211100001
    2210001110111101
"""


def label(setting):
    """A short name, in which a failure can be read."""
    words = [f"k{setting['key_bits']}v{setting['value_bits']}", setting["code"], setting["dtype"]]
    words += [f"h{setting['head_dim']}x{setting['group']}"]
    words += [f"w{setting['window']}s{setting['sinks']}", setting["rotations"][0]]
    if setting["groups"] != "one":
        words += [setting["groups"]]
    options = {
        "sliding": "sliding_window",
        "cap": "softcap",
        "logits": "sink_logits",
        "paged": "paged",
        "ragged": "ragged",
    }
    if setting["centring"] != "none":
        words += [setting["centring"]]
    return "-".join([*words, *(word for word, name in options.items() if setting[name])])


def setting_of(row):
    """The choices that a row of digits names."""
    numbered = zip(FACTORS.items(), row, strict=True)
    return {name: choices[int(digit)] for (name, choices), digit in numbered}


SETTINGS = {label(setting): setting for setting in map(setting_of, CHOICES.split())}


def config_of(setting):
    """The cache of a setting: two layers, so that the second one has an offset."""
    dim = setting["head_dim"]
    codecs = {}
    for side, rotation in zip(("key", "value"), setting["rotations"], strict=True):
        bits, code = setting[f"{side}_bits"], setting["code"]
        if code == "prod":
            bits, code = (bits + 1, code) if side == "key" else (bits, "scalar")
        joint = setting["groups"] == "calibrated" and code != "prod"
        if joint and side == "key":
            bits = ((16, bits), (8, bits - 1), (dim - 24, 1))
        elif joint or setting["groups"] == "outliers":
            bits = ((16, bits), (dim - 16, bits - 1))
        if rotation == "hadamard" and dim & (dim - 1):
            rotation = "block_hadamard"
        scales = "joint" if joint else "group"
        codecs[side] = cache.CodecConfig(bits, rotation, code=code, scales=scales)
    same = ("window", "sinks", "sliding_window", "dtype", "head_dim")
    return cache.CacheConfig(
        num_layers=2,
        num_kv_heads=2,
        block=32,
        **codecs,
        **{name: setting[name] for name in same},
        center_keys=setting["centring"] != "none",
        rope_frequencies=FREQUENCIES if setting["centring"] == "pre_rope" else None,
    )
