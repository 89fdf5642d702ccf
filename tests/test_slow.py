"""Every name in slow.txt is a test: one that was renamed would no longer be left out."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_slow_tests_exist():
    names = (TESTS / "slow.txt").read_text().split()
    assert names
    for name in names:
        file, function = name.split("::")
        found = re.search(rf"^def {function}\(", (TESTS.parent / file).read_text(), re.MULTILINE)
        assert found, name
