"""A program of its own, without the test configuration's checks: a step as one graph of torch."""

import sys

import torch

from tests.pytorch.models import CACHE, prompts, random_model
from tests.pytorch.test_huggingface import small_config
from turboquant_jax.pytorch.capture import CapturedStep
from turboquant_jax.pytorch.huggingface import TurboQuantCache


@torch.no_grad()
def main() -> None:
    model = random_model("Llama")
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache.from_model(model, config=small_config(model), capacity=100)
    model(**prompts(2, 33), **{CACHE: cache})
    for fuse in (False, True):
        check(cache, cache.capture(model, fuse=fuse))
    print("one graph; jax imported:", "jax" in sys.modules)


def check(cache: TurboQuantCache, step: CapturedStep) -> None:
    """Compiled, the step gives the same logits and leaves the same tensors."""
    ids = prompts(2, 2)["input_ids"][:, 1:]
    step._prepare(ids)
    for tensor, value in ((step.ids, ids), (step.positions, 33)):
        tensor.copy_(torch.as_tensor(value))
    saved = {name: leaf.clone() for name, leaf in cache.state.leaves.items()}
    for completing in (False, True):
        expected = step.device_step(completing)
        after = {name: leaf.clone() for name, leaf in cache.state.leaves.items()}
        for name, leaf in cache.state.leaves.items():
            leaf.copy_(saved[name])
        whole = torch.compile(step.device_step, fullgraph=True, backend="eager")
        torch.testing.assert_close(expected, whole(completing))
        for name, leaf in cache.state.leaves.items():
            torch.testing.assert_close(after[name], leaf, msg=name)
            leaf.copy_(saved[name])


if __name__ == "__main__":
    main()
