"""Bits over parts: against trying everything."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.fidelity import judgement
from experiments.fidelity.allocation import Mixed, allocated, remembered, shared_by_heads
from experiments.fidelity.choices import best
from experiments.fidelity.codecs import Mean
from experiments.fidelity.rule import Rule
from experiments.fidelity.settings import Setting, turbo
from experiments.harness.prepared import TINY
from turboquant_jax.cache import allocate
from turboquant_jax.cli import settings


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
    with pytest.raises(ValueError, match="got 4 bits, expected at least the fewest of 5 parts"):
        allocate([{1: 0.5, 2: 0.1}] * 5, 4)


def test_bytes_of_mixed_bits_are_those_of_uniform_bits():
    mixed = Setting("", Mean(2.5), Mean(2.5), 192, 4, 16)
    uniform = turbo(3, 2, "trellis", short=True, window=192, block=16)
    assert mixed.sizes(TINY, 8192) == uniform.sizes(TINY, 8192)


@pytest.mark.parametrize(
    ("loss", "on_calibration", "on_test"),
    [(0.001, "undecided", "holds"), (0.003, "undecided", "undecided"), (0.01, "missed", "missed")],
)
def test_nothing_holds_on_the_texts_that_chose(loss, on_calibration, on_test):
    sizes = {"ratio": 3.6, "ratio_64k": 3.7, "bytes_per_token_64k": 6000.0, "context": 8192}
    losses = {"kl": loss, "kl_se": 1e-4, "perplexity_change": 0.0, "perplexity_change_se": 1e-3}
    row = {"model": "a model", "text": "all", "preset": "a", "centred": 1, **sizes, **losses}
    calibrated, tested = {**row, "kind": "candidate"}, {**row, "kind": "chosen"}
    for rows, verdict in (([calibrated], on_calibration), ([calibrated, tested], on_test)):
        assert [claim.verdict for claim in judgement.claims(rows)] == [verdict] * 2


def test_heads_share_a_part_s_loss_as_they_do_at_one_number_of_bits():
    made = shared_by_heads([{1: 0.8, 2: 0.2}], [[0.3, 0.1]])
    assert made == [
        {1: pytest.approx(0.6), 2: pytest.approx(0.15)},
        {1: pytest.approx(0.2), 2: pytest.approx(0.05)},
    ]


def test_every_head_goes_through_the_code_of_its_bits():
    rule = Rule(64, 4, 64, True)
    uniform = Mixed((2, 3, 1, 1), rule).trips(0, TINY)  # keys of both layers, then the values
    mixed = Mixed((2, 3, 3, 3, 1, 1, 1, 1), rule).trips(0, TINY)
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 64))
    two, three = (uniform(layer)[0](x) for layer in (0, 1))
    np.testing.assert_array_equal(mixed(0)[0](x), jnp.stack([two[:, :, 0], three[:, :, 1]], 2))
    np.testing.assert_array_equal(mixed(1)[0](x), three)


def test_the_library_s_best_is_not_one_it_lacks():
    some = ("a", 3.0, 5.0), ("b scale8", 1.0, 5.0), ("c pre-RoPE", 2.0, 5.0), ("d", 0.5, 4.0)
    rows = [{"preset": name, "kl": kl, "ratio": ratio} for name, kl, ratio in some]
    assert best(rows, "ratio", 4.8)["preset"] == "b scale8"
    assert best(rows, "ratio", 4.8, ours=True)["preset"] == "c pre-RoPE"
    assert best(rows, "ratio", 6.0) is None


def test_remembered_caches_spend_the_bits_of_the_uniform_ones():
    for cached in remembered():
        uniform = cached.setting
        parts = len(cached.mixed.bits)
        assert parts in (60, 180) and cached.rule == uniform.rule
        assert sum(cached.mixed.bits) <= parts * (uniform.key.bits + uniform.value.bits) / 2
        assert cached.columns()["preset"].endswith(uniform.preset)
    with pytest.raises(ValueError, match="has no by head K4 V4"):
        allocated("by head", turbo(4, 4, "trellis", window=128))


def test_the_file_for_the_command_line_is_what_was_measured():
    path = Path(__file__).parents[2] / "experiments" / "allocations" / "smollm2-135m.json"
    found = settings.allocation(path)
    measured = allocated("mixed", turbo(3, 2, "trellis", window=128)).mixed.bits
    assert found is not None and found[1] == "trellis"
    assert found[0].keys + found[0].values == measured
