"""The decoder against Hugging Face transformers, where torch and it are installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.models import dense
from turboquant_jax.models.checkpoint import load, packaged_smollm2
from turboquant_jax.models.decoding import generate
from turboquant_jax.models.huggingface_config import config_from_huggingface
from turboquant_jax.models.rope import inverse_frequencies
from turboquant_jax.models.safetensors import open_safetensors
from turboquant_jax.models.weights import read_huggingface

pytestmark = pytest.mark.reference

SIZES = dict(
    vocab_size=131,
    hidden_size=72,  # not heads * head_dim
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    initializer_range=0.3,
)
LLAMA_3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return torch


def random_checkpoint(folder, *, shard, torch, kind="llama", **options):
    """Save a random transformers model in the folder; its logits on fixed tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SIZES | options)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(0, 0.5)
        model.save_pretrained(folder, max_shard_size=shard)
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 150))
        return tokens.numpy(), model(tokens).logits.numpy(), model


@pytest.mark.parametrize(
    ("options", "shard"),
    [
        (dict(rope_parameters=LLAMA_3, tie_word_embeddings=False), "60KB"),
        (dict(tie_word_embeddings=True), "1GB"),
    ],
)
def test_random_llama(tmp_path, torch, forward, options, shard):
    tokens, expected, model = random_checkpoint(tmp_path, shard=shard, torch=torch, **options)
    config = config_from_huggingface(json.loads((tmp_path / "config.json").read_text()))
    assert config.tie_embeddings == options["tie_word_embeddings"]
    assert (config.rope_scaling is not None) == ("rope_parameters" in options)
    np.testing.assert_allclose(
        inverse_frequencies(config), model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6
    )
    source = open_safetensors(tmp_path)
    assert (len(set(source.shards.values())) > 1) == (shard == "60KB")
    got = forward(read_huggingface(config, source, jnp.float32), jnp.asarray(tokens, jnp.int32))
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)


YARN = dict(
    rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32,
    beta_fast=4.0, beta_slow=0.5,
)  # fmt: skip
ARCHITECTURES = {
    "llama with biases, linear": dict(
        kind="llama", attention_bias=True, mlp_bias=True,
        rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
    ),
    "llama, llama3": dict(kind="llama", rope_parameters=LLAMA_3),
    "mistral": dict(kind="mistral", sliding_window=24),
    "mistral without a window": dict(kind="mistral", sliding_window=None),
    "qwen2, yarn": dict(kind="qwen2", rope_parameters=YARN, tie_word_embeddings=True),
    "qwen2 in a window": dict(
        kind="qwen2", use_sliding_window=True, sliding_window=37, max_window_layers=0
    ),
    "qwen3, yarn": dict(
        kind="qwen3", rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5,
                                       "truncate": False},
    ),
    "qwen3 with biases, llama3": dict(
        kind="qwen3", attention_bias=True, rope_parameters=LLAMA_3, tie_word_embeddings=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(tmp_path, torch, forward, name):
    """Logits past the window and the original context; 100 tokens chosen greedily."""
    options = {"hidden_size": 96} | ARCHITECTURES[name]  # some classes want heads * head_dim
    tokens, expected, reference = random_checkpoint(tmp_path, shard="1GB", torch=torch, **options)
    config = config_from_huggingface(json.loads((tmp_path / "config.json").read_text()))
    assert config.sliding_window == options.get("sliding_window")
    assert (config.rope_scaling is not None) == ("rope_parameters" in options)
    rotary = reference.model.rotary_emb
    np.testing.assert_allclose(inverse_frequencies(config), rotary.inv_freq.numpy(), rtol=1e-5)
    factor = 1 if config.rope_scaling is None else config.rope_scaling.attention_factor
    assert factor == pytest.approx(rotary.attention_scaling)
    model = read_huggingface(config, open_safetensors(tmp_path), jnp.float32, stacked=False)

    got = np.asarray(forward(model, jnp.asarray(tokens, jnp.int32)))
    assert np.std(expected) > 0.5
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))

    prompt = tokens[:1, :20]
    with torch.no_grad():
        answer = reference.generate(
            torch.from_numpy(prompt), max_new_tokens=100, do_sample=False, eos_token_id=-1
        )
    made = generate(
        model,
        jnp.asarray(prompt, jnp.int32),
        jnp.full(1, 20, jnp.int32),
        jax.random.split(jax.random.key(0), 1),
        dense.create(config, 1, 120, jnp.float32),
        dense.DENSE,
        max_tokens=100,
    )
    assert made.tokens[0].tolist() == answer[0, 20:].tolist()
    assert len(set(made.tokens[0].tolist())) > 20


def test_smollm2(smollm2, torch, forward):
    """Logits and perplexity of a paragraph, against transformers' own reader of the file."""
    from transformers import AutoModelForCausalLM

    path = packaged_smollm2()
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    text = (
        "A lighthouse keeper has two duties that matter: the lamp must burn from dusk to dawn, "
        "and the log must say so. In forty years at the station he had missed neither."
    )
    tokens = np.array([smollm2.tokenizer.encode(text)])
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    got = np.asarray(forward(smollm2.model, jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)

    def perplexity(logits):
        wide = logits[0, :-1].astype(np.float64)
        of_targets = np.take_along_axis(wide, tokens[0, 1:, None], axis=1)[:, 0]
        return np.exp(np.mean(np.log(np.exp(wide).sum(axis=1)) - of_targets))

    assert perplexity(got) == pytest.approx(perplexity(expected), rel=1e-5)


def test_chat_template(smollm2, torch):
    """The sandbox renders what transformers renders."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=smollm2.tokenizer.backend)
    reference.chat_template = smollm2.tokenizer.chat_template.text
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Scattering."},
        {"role": "user", "content": "And at dusk?"},
    ]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smollm2.tokenizer.apply_chat(messages) == expected


def test_generated_folder_loads_whole(tmp_path, torch, forward):
    """`load` on what transformers saves, tokenizer and chat template with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens, expected, _ = random_checkpoint(
        tmp_path, shard="1GB", torch=torch, tie_word_embeddings=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")), unk_token="?"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    got = load(tmp_path)
    logits = forward(got.model, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)
    assert got.tokenizer.apply_chat([{"role": "user", "content": "a"}]) == "a"
