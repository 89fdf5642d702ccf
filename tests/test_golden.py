"""Caches hold bit for bit what they held when the digests were written; see `golden`.

Here a few settings; `python -m tests.golden` compares all.
"""

import json

import pytest

from tests import golden

RECORDED = json.loads(golden.FILE.read_text())


def test_every_setting_is_recorded():
    assert set(RECORDED["settings"]) == set(golden.SETTINGS)


@pytest.mark.skipif(bool(golden.unlike(RECORDED)), reason=golden.unlike(RECORDED))
@pytest.mark.parametrize("name, way", golden.IN_TESTS.items())
def test_same_bits(name, way):
    assert not golden.compare(golden.run(name, (way,)), RECORDED["settings"][name])
