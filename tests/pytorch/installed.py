"""A program of its own for an environment that has the wheel alone: a tiny generation on a CPU.

python installed.py, run by `make wheel-torch` outside of the source tree.
"""

import sys
from pathlib import Path

import torch
import transformers

import turboquant_jax
from turboquant_jax.pytorch import TurboQuantCache, supported


def main() -> None:
    package = Path(turboquant_jax.__file__).parent
    if "site-packages" not in package.parts:
        sys.exit(f"turboquant_jax: got that of {package}, expected an installed one")
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=96)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 96, (2, 230))
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    expected = model.generate(ids, **options)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache.from_model(model, preset="lossless")
    with cache.capture(model):
        found = model.generate(ids, **{supported.CACHE: cache}, **options)
    blocks = int(cache.config.num_blocks(cache.steps.longest))
    if found.shape != expected.shape or blocks != 1 or "jax" in sys.modules:
        sys.exit(f"got {tuple(found.shape)}, {blocks} blocks, jax {'jax' in sys.modules}")
    same = (found == expected)[:, 230:]
    print(f"{int(same.sum())} of {same.numel()} tokens as by DynamicCache; jax was not imported")


if __name__ == "__main__":
    main()
