"""Standard errors and verdicts."""

import numpy as np
import pytest

from experiments.harness.statistics import all_equal, are_below, is_below, mean_and_error
from experiments.quantizers.codebook_ablation import entropy, huffman_length


def test_standard_error_counts_draws_where_vectors_share_them():
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.standard_normal((400, 1)), 50, axis=1)
    mean, error = mean_and_error(shared, independent=False)
    assert mean == pytest.approx(shared.mean())
    assert error == pytest.approx(1 / 20, rel=0.15)
    assert mean_and_error(shared, independent=True)[1] == pytest.approx(error / 50**0.5, rel=0.01)


def test_verdicts_need_four_standard_errors():
    assert is_below(0.5, 0.1, 0.95) == "holds"
    assert is_below(0.5, 0.1, 0.85) == "undecided"
    assert is_below(0.5, 0.1, 0.05) == "does not hold"
    assert are_below(["holds", "undecided"]) == "undecided"
    assert are_below(["holds", "undecided", "does not hold"]) == "does not hold"
    assert all_equal([0.0, -3.9]) == "holds"
    assert all_equal([0.0, -4.1]) == "does not hold"


def test_huffman_code_of_known_lengths():
    share = np.array([0.5, 0.25, 0.125, 0.125])
    assert huffman_length(share) == entropy(share) == 1.75
    skewed = np.array([0.9, 0.1, 0.0])
    assert huffman_length(skewed) == 1 > entropy(skewed)
