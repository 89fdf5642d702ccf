"""The step that a CUDA graph holds: the eager one, without a look at the device."""

import subprocess
import sys

import pytest

from tests.pytorch.models import CACHE, FAMILIES, prompts, random_model, torch
from tests.pytorch.test_huggingface import GREEDY, small_config
from turboquant_jax.pytorch import fused
from turboquant_jax.pytorch.huggingface import TurboQuantCache

LOOKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def model_and_cache(family="Llama", **options):
    model = random_model(family)
    model.set_attn_implementation("turboquant")
    return model, TurboQuantCache.from_model(model, config=small_config(model), **options)


@pytest.mark.parametrize("family", ["Llama", "Mistral, sliding"])
def test_generate_with_a_captured_step(family):
    """As without it, padding, growth and completed blocks included."""
    inputs, options = prompts(2, 20, padding=(0, 7)), dict(max_new_tokens=30, **GREEDY)
    model, cache = model_and_cache(family)
    expected = model.generate(**inputs, **{CACHE: cache}, **options)
    other = TurboQuantCache.from_model(model, config=cache.config)
    calls = []
    with other.capture(model) as step:
        original = step.device_step
        step.device_step = lambda completing: calls.append(completing) or original(completing)
        got = model.generate(**inputs, **{CACHE: other}, **options)
    assert "forward" not in vars(model)
    assert len(calls) == 29 and 0 < sum(calls) < 29
    assert torch.equal(expected.sequences, got.sequences)
    assert other.steps.lengths == other.state.table.lengths.tolist() == [49, 42]
    for name, leaf in cache.state.leaves.items():
        torch.testing.assert_close(leaf, other.state.leaves[name], msg=name)


@torch.no_grad()
def test_contexts_of_two_caches():
    """One in the other, whenever they were made; calls with arguments by place; the model after."""
    model, cache = model_and_cache()
    caches = cache, TurboQuantCache.from_model(model, config=cache.config)
    prompt = prompts(1, 9)["input_ids"]
    expected = [model(prompt, **{CACHE: other}).logits for other in caches]
    outer, inner = (other.capture(model) for other in caches)
    with outer:
        with inner:
            for step, other in zip((outer, inner), caches, strict=True):
                out = model(prompt[:, :1], torch.ones(1, 10), **{CACHE: other})
                assert out.logits.shape == (1, 1, 96) and step.ids is None
                model(prompt[:, :1], **{CACHE: other})
                assert step.ids is not None
        assert vars(model)["forward"] is inner.before
        model(prompt[:, :1], **{CACHE: cache})
    assert "forward" not in vars(model)
    assert [other.get_seq_length() for other in caches] == [12, 11]
    cache.reset()
    assert torch.equal(model(prompt, **{CACHE: cache}).logits, expected[0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fused_step_is_the_models(family):
    """Through completed blocks; what it leaves in the cache too."""
    model, cache = model_and_cache(family, capacity=100)
    other = TurboQuantCache.from_model(model, config=cache.config, capacity=100)
    inputs, more = prompts(2, 20, padding=(0, 7)), prompts(2, 22)["input_ids"]
    for some in (cache, other):
        model(**inputs, **{CACHE: some})
    steps = cache.capture(model), other.capture(model, fuse=True)
    for token in more.split(1, dim=1):
        expected, got = (step(token) for step in steps)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for name, leaf in cache.state.leaves.items():
        if not leaf.dtype.is_floating_point:
            assert torch.equal(leaf, other.state.leaves[name]), name


def test_matrices_side_by_side_are_the_models_own(tmp_path):
    """Views of one memory, which loading writes to; a model is saved as before."""
    model, other = random_model("Qwen2"), random_model("Qwen2")
    fused.prepare(model)
    for layer in model.model.layers:
        own = layer.self_attn
        for name in ("weight", "bias"):
            parameters = [getattr(m, name) for m in (own.q_proj, own.k_proj, own.v_proj)]
            whole = fused.side_by_side(parameters)
            assert torch.equal(whole, torch.cat(parameters))
            whole[-1].zero_()
            assert not parameters[-1][-1].any()
    model.load_state_dict(other.state_dict())  # in place: the product is that of the new weights
    assert torch.equal(fused.side_by_side(parameters), torch.cat(parameters))
    model.save_pretrained(tmp_path)
    for held in (model, type(model).from_pretrained(tmp_path)):
        assert all(torch.equal(x, y) for x, y in zip(held.parameters(), other.parameters()))
    own.q_proj.register_forward_hook(lambda *given: None)
    assert not fused._plain([own.q_proj, own.k_proj])


class Forbidding(torch.utils._python_dispatch.TorchDispatchMode):
    """No operation whose result the host, or a shape, waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name().split(".")[0] not in LOOKS, function
        indices = args[1] if "index" in function.name() and len(args) > 1 else ()
        for index in indices if isinstance(indices, (list, tuple)) else ():
            assert index is None or index.dtype != torch.bool, "a mask as an index"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("completing", [False, True])
def test_nobody_looks(completing, fuse):
    """With counts of 0, as while a graph is made, nothing changes either."""
    model, cache = model_and_cache(capacity=100)
    with torch.no_grad():
        model(**prompts(2, 33), **{CACHE: cache})
        step = cache.capture(model, fuse=fuse)
        step._prepare(prompts(2, 1)["input_ids"])
        step.counts.zero_()
        before = {name: leaf.clone() for name, leaf in cache.state.leaves.items()}
        with Forbidding():
            step.device_step(completing)
        for name, leaf in cache.state.leaves.items():
            torch.testing.assert_close(leaf, before[name], msg=name)


def test_the_guard_sees_a_look():
    with Forbidding(), pytest.raises(AssertionError):
        torch.ones(2)[torch.tensor([True, False])]
    with Forbidding(), pytest.raises(AssertionError):
        bool(torch.ones(1).any())


def test_one_graph_of_torch_without_jax():
    """`torch.compile(fullgraph=True)` takes the step whole; nothing on the way imports jax."""
    program = [sys.executable, "-m", "tests.pytorch.fullgraph"]
    run = subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.endswith("one graph; jax imported: False\n"), run.stderr
