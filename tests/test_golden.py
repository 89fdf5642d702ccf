"""Caches hold bit for bit what they held when the digests were written; see `golden`."""

import json

import jax
import pytest

from tests import golden

RECORDED = json.loads(golden.FILE.read_text())


def test_every_setting_is_recorded():
    assert set(RECORDED["settings"]) == set(golden.SETTINGS)


@pytest.mark.skipif(
    jax.__version__ != RECORDED["jax"],
    reason=f"digests are of jax {RECORDED['jax']}, whose sums may round otherwise",
)
@pytest.mark.parametrize("name", RECORDED["settings"])
def test_same_bits(name):
    assert not golden.compare(golden.run(name), RECORDED["settings"][name])
