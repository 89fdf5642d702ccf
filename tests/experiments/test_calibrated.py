"""Calibrated caches in the experiments' engine against the library's, and so the real cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.fidelity import calibrated, codecs
from experiments.fidelity.calibrated import Calibrated
from experiments.fidelity.forcing import Tiling, cut
from experiments.harness import prepared
from turboquant_jax import cache
from turboquant_jax.cache import Allocation, CacheConfig, Calibration, CodecConfig
from turboquant_jax.cache.bytes import count_bytes
from turboquant_jax.cache.calibration import from_moments
from turboquant_jax.models.evaluate import compressed_hidden
from turboquant_jax.models.model import unstack
from turboquant_jax.models.rope import inverse_frequencies

CONTEXT = 90
SPLIT = ((32, 3), (32, 1))


@pytest.fixture(scope="module")
def held():
    """Two layers of two heads in three formats, one of them of both heads of a layer."""
    draws = np.random.default_rng(0).normal(size=(2, 2, 2, 90, 64))
    draws *= np.geomspace(4, 0.2, 64)
    known = Calibration(keys=from_moments(*np.einsum("...ti,...tj->...ij", draws, draws)))
    codec = CodecConfig(code="trellis", scales="joint_products")
    frequencies = tuple(inverse_frequencies(prepared.TINY))
    config = CacheConfig(
        *(2, 2, 64), codec, codec, block=16, window=20, sinks=5, rope_frequencies=frequencies,
        allocation=Allocation((SPLIT, (2, SPLIT)), (2, (2, 1))),
    )  # fmt: skip
    return Calibrated("held", config, known)


@pytest.mark.parametrize(("scale_bits", "piece"), [(16, 8192), (8, 70)])
def test_it_is_the_library_s_teacher_forcing(held, scale_bits, piece, monkeypatch):
    """Coded at once, and in pieces that end within a text."""
    monkeypatch.setattr(codecs, "_PIECE", piece)
    model, tokens = prepared.model("tiny"), prepared.random_texts(2, CONTEXT)
    config = dataclasses.replace(held.config, dtype="float32", scale_bits=scale_bits)
    held = dataclasses.replace(held, config=config)
    state = cache.create(config, 2, CONTEXT, key=jax.random.key(5), calibration=held.known)
    expected = compressed_hidden(unstack(model), jnp.asarray(tokens), state)
    forcing = cut(model, dtype="float32", tiling=Tiling(queries=40, reach=40, sinks=6))
    made = forcing.run(tokens, held.rule, held.trips(5, model.config))
    np.testing.assert_allclose(made.hidden, expected, atol=2e-5)
    assert np.abs(forcing.full(tokens).hidden - expected).max() > 1e-2, "nothing was compressed"


def test_bytes_are_those_of_the_cache_and_its_matrices(held):
    sizes = held.sizes(prepared.TINY, 200)
    state = cache.create(held.config, 1, 200, key=jax.random.key(0), calibration=held.known)
    counted = count_bytes(state)
    assert sizes["bytes_per_token"] * 200 == counted.total
    assert counted.codecs > 3 * 2 * 64 * 64 * 4  # two matrices of each of three heads


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-six", "smollm2-135m-scalar"])
def test_smollm2_s_presets_take_the_bytes_of_the_uniform_ones(name):
    file = f"experiments/calibrations/{name}.safetensors"
    model = prepared.model(prepared.SMOLLM2)
    *found, shorter = calibrated.presets_of(file, model, [128])
    for one, uniform in zip(found, calibrated.uniform(), strict=True):
        assert len(one.config.formats) <= 6
        sizes, same = (each.sizes(model.config, 8192) for each in (one, uniform))
        assert sizes["ratio_64k"] >= same["ratio_64k"] and sizes["ratio"] >= 3.5
        assert sizes["ratio_64k"] >= 7.0 * (one.preset == f"max by {name}")
        assert one.config.window == (256 if one.preset == f"max by {name}" else 128)
    assert (shorter.preset, shorter.config.window) == (f"max by {name} w128", 128)
    wide, narrow = (one.sizes(model.config, 65_536)["ratio"] for one in (found[0], shorter))
    assert wide == pytest.approx(narrow, rel=1e-3) and min(wide, narrow) >= 7.0
    with pytest.raises(ValueError, match="calibration of Smollm2"):
        calibrated.presets_of(file, prepared.model("tiny"))
