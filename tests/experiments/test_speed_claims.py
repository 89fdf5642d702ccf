"""Verdicts over rows of speed measurements, on whatever part of them is there."""

import pytest

from experiments.harness import results
from experiments.speed import decode_speed, encode_speed, prefill_speed, step_speed
from experiments.speed.speed_claims import decode, encode, prefill, step


def decode_row(implementation, shape, speedup, milliseconds=1.0):
    sizes = dict(bits_k=4, bits_v=4, batch=shape[0], tokens=shape[1])
    sizes |= dict(milliseconds=milliseconds, speedup_over_cudnn=speedup)
    return dict(implementation=implementation) | sizes


@pytest.mark.parametrize(("speedup", "verdicts"), [(3.5, "hm"), (3.7, "hh"), (3.1, "mm")])
def test_decoding_is_judged_by_shape(speedup, verdicts):
    rows = [decode_row("cudnn", (8, 32768), 1.0), decode_row("pallas", (8, 32768), speedup)]
    assert "".join(claim.verdict[0] for claim in decode(rows)) == verdicts


@pytest.mark.parametrize(("speedup", "verdict"), [(2.96, "holds"), (2.9, "missed")])
def test_decoding_with_the_mean_before_rope_has_a_target_of_its_own(speedup, verdict):
    row = decode_row("pallas-exact", (32, 4096), speedup) | dict(mean="pre_rope", queries=4)
    (claim,) = decode([row, row | dict(mean="stored"), row | dict(queries=7)])
    assert claim.verdict == verdict


@pytest.mark.parametrize(("dense", "verdict"), [(0.96, "holds"), (0.9, "missed")])
def test_random_pages_are_compared_with_the_same_case_in_order(dense, verdict):
    rows = [decode_row("pallas", (1, 8192), 1.5), decode_row("pallas", (32, 4096), 3.0, 7.0)]
    rows.append(decode_row("pallas-dense", (1, 8192), 1.5, dense))
    assert decode(rows)[-1].verdict == verdict


@pytest.mark.parametrize(("unlike", "verdict"), [(1.05, "holds"), (1.2, "missed")])
def test_unlike_lengths_are_compared_with_equal_ones(unlike, verdict):
    row = decode_row("pallas", (8, 32768), 3.5) | dict(lengths="equal")
    other = decode_row("pallas", (8, 32768), 3.5, unlike) | dict(lengths="uniform")
    (claim,) = decode([row, decode_row("pallas", (32, 4096), 1.0) | dict(lengths="equal"), other])
    assert claim.verdict == verdict


@pytest.mark.parametrize(
    ("judge", "row", "verdict"),
    [
        (step, dict(ratio_to_blocks=1.09), "holds"),
        (step, dict(ratio_to_blocks=1.11), "missed"),
        (encode, dict(fraction_of_copy_bandwidth=0.76), "holds"),
        (encode, dict(fraction_of_copy_bandwidth=0.74), "missed"),
        (prefill, dict(ratio_to_cudnn=1.16), "missed"),
        (prefill, dict(ratio_to_cudnn=1.14, peak_ratio=1.2), "holds"),
    ],
)
def test_the_others(judge, row, verdict):
    common = {
        step: dict(part="step", bits=4, batch=8, tokens=32768, milliseconds=0.1),
        encode: dict(
            implementation="pallas", bits=4, rotation="hadamard", scale="least_squares",
            centred="True", tokens=32768, codes_apart=float("nan"),
        ),
        prefill: dict(setting="chunked: compressed", bits=4, tokens=131072, peak_ratio=1.0),
    }  # fmt: skip
    first, *rest = judge([common[judge] | row])
    assert first.verdict == verdict
    assert all(claim.verdict == "missed" for claim in rest if row.get("peak_ratio", 1.0) > 1.1)


@pytest.mark.parametrize("module", [decode_speed, step_speed, encode_speed, prefill_speed])
def test_every_committed_measurement_is_judged(module):
    for found in results.find(results.COMMITTED, module.__name__.rpartition(".")[2]):
        assert module.claims(found.rows)
    assert module.claims([]) == []
