"""Bits over parts: against trying everything."""

import itertools

import numpy as np
import pytest

from experiments.allocation import allocate


def test_the_allocation_is_the_best_of_all():
    rng = np.random.default_rng(0)
    shares = [{b: float(loss) for b, loss in zip((1, 2, 4), rng.random(3))} for _ in range(5)]
    for budget in (5, 9, 14, 30):
        options = [c for c in itertools.product((1, 2, 4), repeat=5) if sum(c) <= budget]
        losses = {c: sum(s[b] for s, b in zip(shares, c)) for c in options}
        bits, total = allocate(shares, budget)
        assert total == pytest.approx(min(losses.values()))
        assert losses[bits] == pytest.approx(total)


def test_a_budget_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="4 bits is too small for 5 parts"):
        allocate([{1: 0.5, 2: 0.1}] * 5, 4)
