"""Every experiment runs at its smoke size, and can judge and draw what it measured."""

import dataclasses
from functools import partial

import jax
import pytest

from experiments import __main__ as command
from experiments.catalogue import EXPERIMENTS
from experiments.harness import results
from experiments.harness.experiment import GPU, name_of, needs_of
from experiments.speed import decode_speed, encode_speed, step_speed
from experiments.speed.device_time import DeviceTime
from experiments.speed.encode_speed import by_kernel
from pallas_kernels.primitives import triton

by_name = pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name_of)


class OnAGpu:
    """Stand-ins of what only a GPU has: kernels are traced, not run, and nothing is timed."""

    def device_time(self, run, repetitions=1):
        jax.block_until_ready(run())
        return DeviceTime(1e-3, 1e-3)

    def copy_bandwidth(self):
        return 1e9

    def vendor(self, q, k, v, causal=False):
        with jax.numpy_dtype_promotion("standard"):  # its own code wants it
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    def check(self, config, tokens=1):  # numbers of the kernels: tests/pallas_kernels
        assert config.num_kv_heads == 8

    def compiled(self, case):
        jax.eval_shape(case.chain, *jax.eval_shape(case.make))
        return lambda q, caches: q

    def seconds(self, step, sizes, state, q, new):
        with triton.interpreted():
            jax.eval_shape(partial(step_speed.loop, step, sizes), state, q, new)
        return 1e-3, state

    def by_kernel(self, state, source):
        with triton.interpreted():
            jax.eval_shape(by_kernel, state, source)
        return encode_speed.by_definition(state, source)


@pytest.fixture
def on_a_gpu(experiment, monkeypatch):
    if needs_of(experiment) == GPU:
        monkeypatch.setattr(command, "_has_gpu", lambda: True)
        names = [name for name in vars(OnAGpu) if name in vars(experiment) and name[0] != "_"]
        names.remove("seconds") if experiment is encode_speed else None
        for name in names:
            monkeypatch.setattr(experiment, name, getattr(OnAGpu(), name))
        monkeypatch.setattr(decode_speed, "vendor", OnAGpu().vendor)  # whose cases others time too


@by_name
def test_smoke(experiment, on_a_gpu, tmp_path):
    if "vLLM" in needs_of(experiment):
        pytest.skip("needs vLLM, and a GPU: tests/experiments/test_vllm_speed.py")
    if "extra torch" in needs_of(experiment):
        pytest.importorskip("transformers", reason="needs torch: make test-torch")
    assert command.main(["run", name_of(experiment), "--smoke", "--out", str(tmp_path)]) == 0
    (found,) = results.find(tmp_path, name_of(experiment))
    assert found.rows and found.intact
    judged = found
    if needs_of(experiment) == GPU:  # the aims are of full sizes
        judged = results.find(results.COMMITTED, name_of(experiment))[0]
        assert found.rows[0].keys() >= judged.rows[0].keys()
    assert experiment.claims(judged.rows)
    assert isinstance(experiment.claims(found.rows[:1]), list), "part of the cases will do"
    if hasattr(experiment, "figure"):
        assert (found.folder / "figure.svg").stat().st_size < 300_000


@by_name
def test_every_option_is_described(experiment):
    assert all(field.metadata["help"] for field in dataclasses.fields(experiment.Config))
    assert (experiment.__doc__ or "").partition("\n")[0].endswith(".")
