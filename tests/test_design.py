"""The covering design covers."""

from itertools import combinations

from tests.design import FACTORS, SETTINGS


def test_every_pair_of_choices_occurs_in_a_setting():
    for a, b in combinations(FACTORS, 2):
        met = {(setting[a], setting[b]) for setting in SETTINGS.values()}
        assert met == {(x, y) for x in FACTORS[a] for y in FACTORS[b]}, (a, b)


def test_the_settings_are_few():
    """Nine is the least for two factors of three choices; each setting compiles anew."""
    assert 9 <= len(SETTINGS) <= 12
