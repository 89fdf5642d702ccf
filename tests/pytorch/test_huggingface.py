"""The cache under transformers' own `generate`, against their DynamicCache on the same tokens."""

from dataclasses import replace

import pytest

from tests.pytorch.models import CACHE, FAMILIES, prompts, random_model, torch, transformers
from turboquant_jax.cache.config import CodecConfig
from turboquant_jax.pytorch import supported
from turboquant_jax.pytorch.huggingface import TurboQuantCache

GREEDY = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)


def small_config(model, bits=8, **changes):
    """Blocks of 8 and a window of 8, so that a short text is mostly compressed."""
    config = supported.cache_config(model)
    codec = CodecConfig(bits)
    return replace(config, key=codec, value=codec, block=8, window=8, sinks=2, **changes)


def logits_of(model, cache, tokens, mask=None, chunks=()):
    """Logits [B, T, V] of tokens, in chunks of these sizes and then one by one."""
    model.set_attn_implementation("turboquant" if isinstance(cache, TurboQuantCache) else "eager")
    found, first = [], 0
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for size in [*chunks, *[1] * (tokens.shape[1] - sum(chunks))]:
        last = first + size
        with torch.no_grad():
            out = model(
                tokens[:, first:last], attention_mask=mask[:, :last], **{CACHE: cache},
                position_ids=positions[:, first:last], use_cache=True,
            )  # fmt: skip
        found.append(out.logits)
        first = last
    return torch.cat(found, dim=1)


def distance(expected, got):
    return ((expected - got).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_8_bits(family):
    """A padded batch through `generate`: every step's logits as with DynamicCache, to 2e-3."""
    model = random_model(family)
    model.set_attn_implementation("turboquant")
    config = replace(small_config(model), window=16)
    cache = TurboQuantCache.from_model(model, config=config)
    inputs = prompts(3, 30, padding=(0, 11, 29))
    got = model.generate(**inputs, **{CACHE: cache}, max_new_tokens=40, **GREEDY)
    assert cache.steps.lengths == cache.state.table.lengths.tolist() == [69, 58, 40]
    assert config.num_blocks(cache.state.table.lengths).tolist() == [6, 5, 2]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 39, dtype=torch.long)], dim=1)
    expected = logits_of(
        model, transformers.DynamicCache(config=model.config), got.sequences[:, :-1], mask, (30,)
    )
    assert distance(expected[:, 29:], torch.stack(got.logits, dim=1)) < 2e-3


def test_full_precision_and_one_bit():
    """Within the window nothing is lost; at one bit much is: the cache is really used."""
    model = random_model("Llama")
    tokens = prompts(2, 60)["input_ids"]
    expected = logits_of(model, transformers.DynamicCache(config=model.config), tokens, None, (50,))
    for config, low, high in (
        (replace(small_config(model), window=64), 0, 1e-5),
        (small_config(model, bits=1), 0.03, 1),
    ):
        cache = TurboQuantCache.from_model(model, config=config)
        assert low <= distance(expected, logits_of(model, cache, tokens, None, (50,))) < high


@pytest.mark.parametrize("chunks", [(), (50,), (7, 1, 13, 20)])
def test_chunks_of_a_prompt_give_one_cache(chunks):
    """The law of the library: any chunks, the same tensors; of the first layer, whose keys no

    attention comes before. Matrix products of other chunks have other last bits: a code may differ.
    """
    model = random_model("Qwen3")
    inputs = prompts(2, 60, padding=(0, 5))
    config = small_config(model)
    whole, other = (TurboQuantCache.from_model(model, config=config, capacity=80) for _ in "ab")
    logits_of(model, whole, inputs["input_ids"], inputs["attention_mask"], (60,))
    logits_of(model, other, inputs["input_ids"], inputs["attention_mask"], chunks)
    assert whole.state.table.lengths.tolist() == [60, 55]
    for name, leaf in whole.state.leaves.items():
        got = other.state.leaves[name]
        if name.startswith("parts"):
            assert (leaf[:2] != got[:2]).to(torch.float32).mean() < 2e-3, name
        elif name.startswith(("sinks", "window", "key_mean")):
            torch.testing.assert_close(leaf[0], got[0], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(leaf, got), name


def test_beams():
    """A beam search shares the pages of the beams that go on; a reset takes all back."""
    model = random_model("Llama")
    inputs = prompts(2, 30, padding=(0, 9))
    options = dict(num_beams=3, max_new_tokens=25, do_sample=False)
    model.set_attn_implementation("eager")
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache.from_model(model, config=small_config(model))
    for _ in range(2):
        got = model.generate(**inputs, **{CACHE: cache}, **options)
        assert torch.equal(expected, got)
        assert cache.state.table.references.max() > 1
        cache.reset()


def test_several_turns_in_one_cache():
    """A second turn reads only what is new, and sees the first."""
    model = random_model("Llama")
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache.from_model(model, config=small_config(model))
    first = model.generate(**prompts(1, 30), **{CACHE: cache}, max_new_tokens=10, do_sample=False)
    assert cache.get_seq_length() == 39
    more = torch.cat([first, prompts(1, 20)["input_ids"]], dim=1)
    second = model.generate(more, **{CACHE: cache}, max_new_tokens=10, **GREEDY)
    expected = logits_of(
        model, transformers.DynamicCache(config=model.config), second.sequences[:, :-1], None, (60,)
    )
    assert distance(expected[:, 59:], torch.stack(second.logits, dim=1)) < 2e-3
    model.set_attn_implementation("turboquant")
    cache.reset()
    again = model.generate(**prompts(1, 30), **{CACHE: cache}, max_new_tokens=10, do_sample=False)
    assert torch.equal(first, again)


def test_prefill_in_chunks_of_generate():
    model = random_model("Mistral, sliding")
    model.set_attn_implementation("turboquant")
    inputs, options = prompts(2, 50, padding=(0, 12)), dict(max_new_tokens=12, **GREEDY)
    caches = [TurboQuantCache.from_model(model, config=small_config(model)) for _ in "ab"]
    whole = model.generate(**inputs, **{CACHE: caches[0]}, **options)
    chunked = model.generate(**inputs, **{CACHE: caches[1]}, prefill_chunk_size=16, **options)
    assert distance(torch.stack(whole.logits), torch.stack(chunked.logits)) < 2e-3


def test_crop():
    """Tokens that the window still holds can be taken back, others not."""
    model = random_model("Llama")
    tokens = prompts(1, 60)["input_ids"]
    config = small_config(model)
    cache, other = (TurboQuantCache.from_model(model, config=config) for _ in "ab")
    logits_of(model, cache, tokens[:, :43], None, (40,))
    assert [int(config.num_blocks(n)) for n in (41, 42, 43)] == [3, 4, 4]
    with pytest.raises(ValueError, match="crop: got 3 tokens of a sequence of 43"):
        cache.crop(-3)
    logits_of(model, other, tokens[:, :42], None, (40,))
    other.crop(-2)  # the block that token 42 completed is in the window as yet
    assert other.get_seq_length() == 40
    for tried in (cache, other):
        tried.crop(-1 if tried is cache else 0)
    fresh = TurboQuantCache.from_model(model, config=config)
    expected = logits_of(model, fresh, tokens, None, (40,))[:, 40:]
    model.set_attn_implementation("turboquant")
    with torch.no_grad():
        rest = torch.cat([
            model(tokens[:, i : i + 1], **{CACHE: other}).logits for i in range(40, 60)
        ], dim=1)  # fmt: skip
    torch.testing.assert_close(expected, rest, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="crop: got 5, expected 0 or less"):
        other.crop(5)


def test_batches_are_repeated_and_selected():
    model = random_model("Llama")
    tokens = prompts(2, 50)["input_ids"]
    caches = [TurboQuantCache.from_model(model, config=small_config(model)) for _ in "ab"]
    for cache in caches:
        logits_of(model, cache, tokens[:, :40], None, (40,))
    caches[0].batch_repeat_interleave(2)
    caches[0].batch_select_indices(torch.tensor([3, 0]))
    swapped = logits_of(model, caches[0], tokens[[1, 0], 40:], torch.ones(2, 50)[:, :10].long())
    plain = logits_of(model, caches[1], tokens[:, 40:], torch.ones(2, 50)[:, :10].long())
    torch.testing.assert_close(swapped[[1, 0]], plain, rtol=1e-4, atol=1e-4)


def test_presets_of_real_codes():
    """The trellis of a preset, and a cache that grows beyond what it began with."""
    model = random_model("Qwen2")
    tokens = prompts(2, 330)["input_ids"]
    caches = [TurboQuantCache.from_model(model, capacity=room) for room in (None, 330)]
    grown, fixed = (logits_of(model, cache, tokens, None, (100, 150, 70)) for cache in caches)
    torch.testing.assert_close(grown, fixed, rtol=1e-5, atol=1e-6)
    assert caches[0].state.capacity > 330 and int(caches[0].config.num_blocks(330)) == 3
    expected = logits_of(
        model, transformers.DynamicCache(config=model.config), tokens, None, (330,)
    )
    assert distance(expected, grown) < 0.05
