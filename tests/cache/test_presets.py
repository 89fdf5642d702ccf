"""The presets take the bytes that their table says, which are those of the measured rows."""

import re

import pytest

from experiments.fidelity.settings import turbo
from experiments.harness import results
from experiments.harness.experiment import where
from turboquant_jax import cache
from turboquant_jax.cache import presets
from turboquant_jax.cache.bytes import exact_bytes_per_token, planned_bytes
from turboquant_jax.models import LlamaConfig

SMOLLM2 = 30, 3, 64
MEASURED = {
    "lossless": "K4 V4 trellis w128",
    "balanced": "K3 V3 trellis w128",
    "compact": "K3 V2 trellis w128",
    "max": "K2 V2 trellis w128",
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_table_is_what_is_planned_and_measured(name):
    config = cache.preset(name, *SMOLLM2)
    line = re.search(rf"^ +{name} .*$", presets.__doc__, re.MULTILINE).group()
    *_, near, near_ratio, far, far_ratio, change, change_se, kl = re.findall(r"\d[\d.,]*", line)
    exact = exact_bytes_per_token(config)
    for length, size, ratio in ((8192, near, near_ratio), (65536, far, far_ratio)):
        planned = planned_bytes(config, 1, length).total / length
        assert f"{planned:,.0f}" == size
        assert f"{exact / planned:.2f}" == ratio
    rows = results.read(results.COMMITTED / "fidelity").rows
    (row,) = where(rows, kind="chosen", preset=MEASURED[name], text="all")
    assert row["bytes_per_token"] == pytest.approx(
        planned_bytes(config, 1, 8192).total / 8192, rel=1e-5
    )
    assert f"{row['perplexity_change']:.2%}" == f"{change}%"
    assert f"{row['perplexity_change_se']:.2%}" == f"{change_se}%"
    assert f"{row['kl']:.4f}" == kl


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset: got 'tiny', expected one of lossless"):
        cache.preset("tiny", *SMOLLM2)


def test_the_measured_settings_are_the_presets():
    model = LlamaConfig(1, 1, 1, *(30, 9, 3, 64), 8192, 1e4, 1e-5, True)
    for name, measured in MEASURED.items():
        config = cache.preset(name, *SMOLLM2)
        code = config.key.code
        setting = turbo(config.key.bits, config.value.bits, code, window=128)
        assert setting.preset == measured
        assert setting.cache_config(model) == config
