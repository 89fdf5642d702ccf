"""What is not served is refused, in words that say what is."""

from dataclasses import replace

import pytest

from tests.pytorch.models import CACHE, SIZES, prompts, random_model, torch, transformers
from tests.pytorch.test_huggingface import logits_of, small_config
from turboquant_jax.cache.config import CacheConfig, CodecConfig
from turboquant_jax.pytorch import TurboQuantCache, creation, supported

SCALED = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)


def test_models():
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    )
    with pytest.raises(
        ValueError, match=r"got GPT2LMHeadModel, expected one of Llama, Mistral, Qwe"
    ):
        TurboQuantCache.from_model(gpt)
    with pytest.raises(ValueError, match=r"rope_type: got 'dynamic', expected 'default' or"):
        TurboQuantCache.from_model(random_model("Llama", rope_parameters=SCALED))
    mixed = dict(use_sliding_window=True, sliding_window=24, max_window_layers=1)
    with pytest.raises(ValueError, match=r"layer_types: got .*windows by layer are not served"):
        TurboQuantCache.from_model(random_model("Qwen2", **mixed))
    with pytest.raises(
        ValueError, match=r"dtype of the model: got float64, expected one of bfloat"
    ):
        TurboQuantCache.from_model(random_model("Llama").double())
    with pytest.raises(ValueError, match=r"preset: got 'tiny', expected one of lossless"):
        TurboQuantCache.from_model(random_model("Llama"), preset="tiny")


def test_configurations():
    model = random_model("Llama")
    config = small_config(model)
    for change, text in (
        (dict(num_layers=3), "num_layers: got 3, expected the model's 2"),
        (dict(sliding_window=30), "sliding_window: got 30, expected the model's None"),
        (dict(rope_frequencies=(1.0,) * 8), "rope_frequencies: got others, expected the model's"),
    ):
        with pytest.raises(ValueError, match=text):
            TurboQuantCache.from_model(model, config=replace(config, **change))
    with pytest.raises(ValueError, match=r"capacity: got 0, expected at least 1 token"):
        TurboQuantCache.from_model(model, capacity=0)
    with pytest.raises(ValueError, match=r"code: got 'prod', expected one of scalar, trellis"):
        creation.create(CacheConfig(1, 1, 16, CodecConfig(3, code="prod")), 1, 300)
    joint = CodecConfig(4, scales="joint")
    with pytest.raises(ValueError, match=r"calibration of the keys: got None layers"):
        creation.create(CacheConfig(1, 1, 16, joint), 1, 300)
    with pytest.raises(ValueError, match=r"seed: got -1, expected 0 to 4294967295"):
        creation.create(CacheConfig(1, 1, 16), 1, 300, seed=-1)


def test_a_model_without_a_head_is_not_fused():
    model = random_model("Llama").model
    cache = TurboQuantCache.from_model(model, config=small_config(model))
    with pytest.raises(ValueError, match="got LlamaModel, expected one for causal language"):
        cache.capture(model, fuse=True)


def test_another_model_or_attention():
    """A cache is for the model it was made for, under its attention; and the attention for it."""
    model, other = random_model("Llama"), random_model("Llama")
    cache = TurboQuantCache.from_model(model, config=small_config(model))
    inputs = prompts(1, 5)
    with pytest.raises(AttributeError, match=r"expected 'turboquant': call model.set_attn_imple"):
        model(**inputs, **{CACHE: cache})
    pending, _ = cache.layers[0].update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16))
    with pytest.raises(AttributeError, match=r"asks keys for 'scaled_dot_product_attention'"):
        torch.nn.functional.scaled_dot_product_attention(torch.zeros(1, 2, 5, 16), pending, pending)
    for each in (model, other):
        each.set_attn_implementation("turboquant")
    with pytest.raises(ValueError, match=r"model: got another one than the cache was made for"):
        other(**inputs, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"model: got another one than the cache was made for"):
        cache.capture(other)
    with pytest.raises(
        ValueError, match=r"past_key_values: got none or another cache, expected a T"
    ):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask: got 4 dimensions, expected 2"):
        model(inputs["input_ids"], attention_mask=torch.ones(1, 1, 5, 5), **{CACHE: cache})
    dropping = random_model("Llama", attention_dropout=0.1).train()
    dropping.set_attn_implementation("turboquant")
    with pytest.raises(ValueError, match=r"dropout: got 0.1, expected 0"):
        dropping(**inputs, **{CACHE: TurboQuantCache.from_model(dropping)})
    with pytest.raises(NotImplementedError, match=r"expected it of the whole cache"):
        cache.layers[0].reset()


def test_sizes():
    """Another batch, or more tokens than there is room for, leave the cache as it was."""
    model = random_model("Llama")
    cache = TurboQuantCache.from_model(model, config=small_config(model), capacity=40)
    logits_of(model, cache, prompts(2, 38)["input_ids"], None, (38,))
    with pytest.raises(ValueError, match=r"batch: got 3 sequences, expected the cache's 2"):
        model(**prompts(3, 1), **{CACHE: cache})
    with pytest.raises(
        ValueError, match=r"capacity: got up to 41 tokens of a sequence, expected 40"
    ):
        model(prompts(2, 3)["input_ids"], **{CACHE: cache})
    assert cache.get_seq_length() == 38 and cache.state.table.lengths.tolist() == [38, 38]
    cache.reset()
    model(**prompts(3, 5), **{CACHE: cache})
    assert cache.batch_size == 3


def test_a_call_that_was_broken_off():
    """Some layers have its tokens, some not: the cache is of no use until it is emptied."""
    model = random_model("Llama")
    cache = TurboQuantCache.from_model(model, config=small_config(model))
    expected = logits_of(model, cache, prompts(1, 9)["input_ids"], None, (9,))
    last = model.model.layers[-1].self_attn.q_proj
    hook = last.register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompts(1, 1)["input_ids"], **{CACHE: cache})
    hook.remove()
    with pytest.raises(ValueError, match=r"ended before the model's last layer, .* reset\(\) it"):
        model(prompts(1, 1)["input_ids"], **{CACHE: cache})
    cache.reset()
    assert torch.equal(logits_of(model, cache, prompts(1, 9)["input_ids"], None, (9,)), expected)


@pytest.mark.parametrize("module, version", [("transformers", "4.57.1"), ("torch", "2.4.0+cpu")])
def test_versions(module, version, monkeypatch):
    monkeypatch.setattr(getattr(supported, module), "__version__", version)
    with pytest.raises(ImportError, match=rf"{module}: got {version[:5]}.*, expected "):
        supported.check_versions()


def test_sizes_of_the_test_models_are_real():
    """Head dims that are no power of two have dense rotations; the random models have none."""
    sizes = dict(SIZES, hidden_size=48, head_dim=12)
    model = random_model("Llama", **{k: sizes[k] for k in ("hidden_size", "head_dim")})
    assert supported.cache_config(model).key.rotation == "haar"
    assert supported.cache_config(random_model("Llama")).key.rotation == "hadamard"
