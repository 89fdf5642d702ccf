"""Options crossed: few settings of a cache and a call in which every pair of choices occurs."""

from itertools import combinations

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


def pairs_of(setting):
    """Every two choices of a setting."""
    return set(combinations(setting.items(), 2))


def all_pairs(factors, tries=30):
    """Settings that cover every pair of choices, greedily: of a few candidates the one that covers
    most pairs not met before; each starts from such a pair and adds the best choice, factor by
    factor.
    """
    rng = np.random.default_rng(3)  # of a few seeds one with few settings
    names, settings = list(factors), []
    missing = {
        ((a, x), (b, y)) for a, b in combinations(names, 2) for x in factors[a] for y in factors[b]
    }

    def candidate():
        todo = sorted(missing, key=repr)
        setting = dict(todo[rng.integers(len(todo))])
        for i in rng.permutation(len(names)):
            name = names[i]
            if name not in setting:
                gain = [
                    sum(
                        ((name, level), one) in missing or (one, (name, level)) in missing
                        for one in setting.items()
                    )
                    for level in factors[name]
                ]
                setting[name] = factors[name][int(np.argmax(gain))]
        return {name: setting[name] for name in names}

    while missing:
        best = max(
            (candidate() for _ in range(tries)), key=lambda one: len(pairs_of(one) & missing)
        )
        settings.append(best)
        missing -= pairs_of(best)
    return settings


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


SETTINGS = {label(setting): setting for setting in all_pairs(FACTORS)}


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
