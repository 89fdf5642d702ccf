"""What compression does to predictions, against scipy in float64 on given logits."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.tree_util import register_dataclass
from scipy import special, stats

from turboquant_jax.models.evaluate import compare


@register_dataclass
@dataclass(frozen=True)
class Plain:
    """A model whose final hidden vectors are its logits."""

    def logits(self, hidden):
        return hidden


def test_likelihood_divergence_and_agreement_are_those_of_the_definitions():
    """KL of the other prediction from the exact one, likelihood of the text under the other."""
    rng = np.random.default_rng(0)
    exact, other = rng.normal(0, 2, (2, 2, 300, 7)).astype(np.float32)
    tokens = rng.integers(0, 7, (2, 300)).astype(np.int32)
    got = compare(Plain(), *map(jax.numpy.asarray, (tokens, exact, other)))
    log_p, log_q = (special.log_softmax(x[:, :-1].astype(float), -1) for x in (exact, other))
    nll = -np.take_along_axis(log_q, tokens[:, 1:, None], -1).ravel()
    kl = stats.entropy(np.exp(log_p), np.exp(log_q), axis=-1).ravel()
    # in whichever order the tokens come
    np.testing.assert_allclose(np.sort(got.nll), np.sort(nll), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sort(got.kl), np.sort(kl), rtol=1e-5, atol=1e-6)
    assert got.agrees.sum() == np.sum(log_p.argmax(-1) == log_q.argmax(-1))
    assert got.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-6)
