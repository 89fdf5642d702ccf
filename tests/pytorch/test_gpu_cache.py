"""A whole torch cache on a GPU: by the kernels as by the definition, captured as eager."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.pytorch.skip import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU under torch", allow_module_level=True)
from tests.pytorch.models import CACHE, prompts, random_model
from tests.pytorch.test_kernels import CASES, assert_alike
from turboquant_jax.cache.config import CodecConfig
from turboquant_jax.pytorch import choose, creation, supported, updating
from turboquant_jax.pytorch.huggingface import TurboQuantCache
from turboquant_jax.pytorch.segments import Scores

pytestmark = pytest.mark.gpu
SIZES = dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
GREEDY = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("name", ["before RoPE", "trellis"])
def test_kernels_on_the_gpu_are_the_definition_on_a_cpu(name):
    """A prompt and single tokens, until blocks were completed by both ways."""
    config = CASES[name]
    ours = creation.create(config, 2, 120, seed=1)
    other = creation.create(config, 2, 120, seed=1, device="cuda")
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(getattr(torch, config.dtype)) + 1

    def both(name, *given):
        """On the CPU, then on the GPU."""
        for cache in (ours, other):
            own = [x.to(cache.device) if isinstance(x, torch.Tensor) else x for x in given]
            by = choose.compression_of(cache, None)
            found = getattr(updating, name)(cache, *own, **{} if name == "begin" else {"by": by})
            assert found is None

    both("begin", torch.tensor([65, 66]), 66)
    for layer in range(2):
        both("write", layer, random(2, 66, 2, 32), random(2, 66, 2, 32))
    both("commit")
    for _ in range(6):
        both("begin", torch.ones(2), 1)
        for layer in range(2):
            heads = random(2, 1, 4, 32), random(2, 1, 2, 32), random(2, 1, 2, 32)
            found = [
                choose.attend_and_write(
                    cache, layer, tuple(x.to(cache.device) for x in heads), Scores(), None
                ).cpu()
                for cache in (ours, other)
            ]
            torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
        both("commit")
    assert int(config.num_blocks(ours.table.lengths).sum()) == 4

    assert_alike(ours, SimpleNamespace(leaves={k: x.cpu() for k, x in other.leaves.items()}))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_captured_and_eager(dtype, fuse):
    """Padding and completed blocks; logits near those of a DynamicCache, captured ones the same."""
    model = random_model("Llama", **SIZES).to("cuda", getattr(torch, dtype))
    config = supported.cache_config(model)
    codec = CodecConfig(8)
    config = replace(config, key=codec, value=codec, block=32, window=16, sinks=2)
    inputs = {k: v.cuda() for k, v in prompts(2, 60, padding=(0, 7)).items()}
    model.set_attn_implementation("sdpa")
    expected = model.generate(**inputs, max_new_tokens=50, **GREEDY)
    model.set_attn_implementation("turboquant")
    eager, captured = (TurboQuantCache.from_model(model, config=config) for _ in "ab")
    first = model.generate(**inputs, **{CACHE: eager}, max_new_tokens=50, **GREEDY)
    with captured.capture(model, fuse=fuse) as step:
        second = model.generate(**inputs, **{CACHE: captured}, max_new_tokens=50, **GREEDY)
        assert step.graphs.keys() == {False, True}
    assert captured.steps.lengths == captured.state.table.lengths.tolist() == [109, 102]
    if fuse:  # rounded in other places, so that a code at a tie may be its neighbour
        assert apart(second, first) < (1e-4 if dtype == "float32" else 2e-2)
    else:
        assert torch.equal(first.sequences, second.sequences)
        for x, y in zip(first.logits, second.logits, strict=True):
            torch.testing.assert_close(x, y)
        for name, leaf in eager.state.leaves.items():
            torch.testing.assert_close(leaf, captured.state.leaves[name], msg=name)
    assert apart(first, expected) < (2e-3 if dtype == "float32" else 2e-2)


def apart(ours, theirs):
    """Of logits, relative to their norm, as long as both read the same tokens."""
    same = (ours.sequences == theirs.sequences).all(dim=0)
    count = int(same.long().cumprod(dim=0).sum()) - 60
    assert count > 0
    x, y = (torch.stack(found.logits[:count]).float() for found in (ours, theirs))
    return (x - y).norm() / y.norm()
