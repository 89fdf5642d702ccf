"""Calibration of a small model: what it predicts, what it chooses, and that it goes on."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turboquant_jax import cache
from turboquant_jax.cache import CodecConfig, files, fitting, load_calibration, save_calibration
from turboquant_jax.cache.allocation import Allocation
from turboquant_jax.cache.bytes import compression_ratio
from turboquant_jax.cache.calibration import Calibration
from turboquant_jax.models import Llama, LlamaConfig, calibrate, gathered, rope
from turboquant_jax.models.calibrate import Plan, Text, judge, windows
from turboquant_jax.models.checkpoint import Checkpoint
from turboquant_jax.models.evaluate import compare, compressed_hidden, exact_hidden
from turboquant_jax.models.gathered import Gathered, error
from turboquant_jax.models.identity import key_digest, require_calibrated
from turboquant_jax.models.model import unstack
from turboquant_jax.models.sensitivity import alone, final, look_back, read
from turboquant_jax.models.tokenizer import byte_tokenizer

MODEL = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=256,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=True,
)
CODEC = CodecConfig(code="trellis", scales="joint_products")
CONFIG = cache.CacheConfig(
    2, 2, 16, CODEC, CODEC, block=8, window=8, sinks=2, dtype="float32", **rope.centring(MODEL)
)
CONTEXT = 40
PLAN = Plan(CONFIG, ratio=8.0, capacity=4096, context=CONTEXT, windows=3, alone=2)


def quiet(what, done, steps):
    assert 0 <= done < steps


@pytest.fixture(scope="module")
def checkpoint():
    model = unstack(jax.jit(lambda: Llama(MODEL, nnx.Rngs(0), jnp.float32))())
    return Checkpoint("tiny", MODEL, model, byte_tokenizer(300))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 61, 3 * CONTEXT + 7) for _ in range(2)]
    return [Text(f"text {i}", str(i), tuple(map(int, ids))) for i, ids in enumerate(drawn)]


@pytest.fixture(scope="module")
def known(checkpoint, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "tiny.safetensors"
    return calibrate.calibrate(checkpoint, texts, PLAN, out, quiet), out


def assert_same(one, other):
    """Bit by bit, what is known and where it is from."""
    jax.tree.map(np.testing.assert_array_equal, one.keys, other.keys)
    assert one.study == other.study and one.values is other.values is None


def moments_of(checkpoint, tokens):
    """Of every head by numpy in float64, keys centred by their mean before RoPE."""
    captured = []

    def attend(state, layer, projection):
        q, k, v = projection.heads()
        captured.append((q[0], k[0]))
        mask = np.tril(np.ones((len(tokens), len(tokens)), bool))
        grouped = q[0].reshape(len(tokens), 2, 2, 16)
        scores = jnp.einsum("tkgh,skh->kgts", grouped, k[0]) / 4
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgts,skh->tkgh", weights, v[0]).reshape(q.shape), state

    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    checkpoint.model(jnp.asarray(tokens)[None], positions, (), attend)
    turns = np.exp(1j * np.outer(np.arange(len(tokens)), rope.inverse_frequencies(MODEL)))[:, None]
    found = []
    for q, k in captured:
        k = np.asarray(k, np.float64)
        pairs = (k[..., :8] + 1j * k[..., 8:]) / turns
        taken = np.broadcast_to(pairs[2:10].mean(axis=0), pairs.shape) * turns
        k = k - np.concatenate([taken.real, taken.imag], axis=-1)
        q = np.asarray(q, np.float64).reshape(len(tokens), 2, 2, 16)
        of_k = np.einsum("tki,tkj->kij", k[2:], k[2:]) / (len(tokens) - 2)
        of_q = np.einsum("tkgi,tkgj->kij", q[2:], q[2:]) / (2 * (len(tokens) - 2))
        found.append((of_k, of_q))
    return [np.stack(x) for x in zip(*found, strict=True)]


def test_moments_of_the_texts_are_those_of_numpy(checkpoint, texts, tmp_path, monkeypatch):
    """Up to what the tables of angles round, 3e-3 of the mean key; no room to start elsewhere."""
    kept = {}

    def stopping(path, arrays, facts):
        kept.update(arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(
            checkpoint, texts, replace(PLAN, capacity=CONTEXT), tmp_path / "tiny", quiet
        )
    choosing, _ = windows(texts, CONTEXT, 3)
    for name, expected in zip(
        ("of_keys", "of_queries"), moments_of(checkpoint, choosing[0]), strict=True
    ):
        size = np.abs(expected).max(axis=(2, 3), keepdims=True)
        np.testing.assert_allclose(kept[name] / size, expected / size, atol=0.02)


def test_what_judges_is_teacher_forcing(checkpoint, known):
    """The library's, of a whole cache with heads of several formats."""
    split = calibrate.menu(16)[0][-1]
    allocation = Allocation(keys=((split, 2), 1), values=(2, (1, 3)))
    tokens = np.random.default_rng(1).integers(0, 61, 50).astype(np.int32)
    config = replace(CONFIG, allocation=allocation)
    key = jax.random.key(0)
    state = cache.create(config, 1, 1, key=key, calibration=known[0])
    model, ids = checkpoint.model, jnp.asarray(tokens)[None]
    hidden = compressed_hidden(model, ids, state)
    expected = compare(model, ids, exact_hidden(model, ids), hidden).kl[18:].mean()
    found = judge(model, tokens, CONFIG, allocation, known[0])
    assert expected > 1e-3
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
def test_gradients_predict_the_loss_of_small_errors(checkpoint, side):
    """Half of the mean square of <g, d> over drawn texts, of one head; within 4 standard errors."""
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, 61, 48), jnp.int32)
    off = np.zeros((2, 48, 2, 16), np.float32)
    off[side, :, 1] = rng.normal(0, 0.02, (48, 16))
    nothing = np.zeros((48, 2, 16), np.float32)

    def errors(layer, seen):
        return (nothing, nothing) if layer else (jnp.asarray(off[0]), jnp.asarray(off[1]))

    model = checkpoint.model
    exact, other = (
        [hidden for _, hidden in read(model, tokens, CONFIG, e)][-1] for e in (None, errors)
    )
    made = compare(model, tokens[None], final(model, exact), final(model, other)).kl.sum()
    drawn = []
    for seed in range(120):
        *_, (layer, _, gradients) = look_back(model, tokens, CONFIG, jax.random.key(seed))
        assert layer == 0
        drawn.append(np.sum(np.asarray(gradients[side]) * off[side]) ** 2 / 2)
    spread = np.std(drawn) / np.sqrt(len(drawn))
    assert made > 0 and spread < 0.3 * made
    # the last token's prediction is not compared
    assert abs(np.mean(drawn) - made) < 4 * spread


def test_a_text_may_start_anywhere(checkpoint):
    """Keys and queries turn with the position; their products, and what they lose, do not."""
    tokens, key = jnp.arange(64) % 50, jax.random.key(1)
    near, far = (
        list(look_back(checkpoint.model, tokens, CONFIG, key, start)) for start in (0, 3000)
    )
    for (_, one, of_one), (_, other, of_other) in zip(near, far, strict=True):
        assert np.abs(one.k - other.k).max() > 0.1
        products = [jnp.einsum("tgh,sgh->gts", seen.k, seen.k) for seen in (one, other)]
        np.testing.assert_allclose(*products, atol=0.02 * np.abs(products[0]).max())
        np.testing.assert_allclose(of_one[1], of_other[1], atol=0.02 * np.abs(of_one[1]).max())


def test_losses_are_measured_in_passes(checkpoint, known, texts):
    """Of the keys of a layer, and of the values: what a pass loses in which they alone are off.

    Errors of 1 bit are large, so that half the mean square of <g, d> is not what they lose. Those
    of 4 bits are small: no pass is made with them, and squared errors say what one would lose.
    """
    config, (found, _) = CONFIG, known
    losses = found.study.losses
    whole = [np.asarray(side).sum(axis=1) for side in (losses.keys, losses.values)]
    choosing, _ = windows(texts, CONTEXT, 3)
    key = partial(jax.random.fold_in, jax.random.key(0))
    for side, layer, column in ((0, 1, 0), (1, 0, 0), (0, 0, 6), (0, 1, 3), (1, 0, 3)):
        measured = []
        for index, tokens in enumerate(choosing[[0, 2]]):
            turn = jax.random.split(jax.random.fold_in(key(index), 1))[side]
            bits = calibrate.menu(16)[side][column]
            codec = (config.key, config.value)[side].of(bits)
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], found.keys)

            def errors(at, seen, side=side, layer=layer, codec=codec, turn=turn, own=own):
                off = [jnp.zeros_like(seen.k)] * 2
                if at == layer:
                    x = (seen.k, seen.v)[side]
                    off[side] = error(codec, turn, None if side else own, x)
                return tuple(off)

            start = Gathered(Path("none"), "", config, ((1,), (1,)), 256)._start(
                jnp.asarray(tokens), key(index)
            )
            exact, other = (
                [h for _, h in read(checkpoint.model, jnp.asarray(tokens), config, e, start)][-1]
                for e in (None, errors)
            )
            made = (final(checkpoint.model, hidden) for hidden in (exact, other))
            kl = compare(checkpoint.model, jnp.asarray(tokens)[None], *made).kl
            # behind 2 sinks and a window of 8 the first block of 8 is compressed at 18 tokens
            assert np.all(kl[:18] < 1e-5) and kl[18] > 1e-5
            measured.append(kl[18:].mean())
        assert whole[side][layer, column] > (1e-5 if column == 3 else 1e-3)
        within = 0.25 if column == 3 else 2e-3
        assert whole[side][layer, column] == pytest.approx(np.mean(measured), rel=within)


def test_what_is_never_compressed_cannot_be_asked(checkpoint):
    with pytest.raises(ValueError, match="text: got 18 tokens"):
        next(alone(checkpoint.model, jnp.arange(18), CONFIG))


def test_heads_share_a_loss_as_those_of_one_format(tmp_path):
    rng = np.random.default_rng(5)
    gathered = Gathered(tmp_path / "none", "", CONFIG, ((1, 2, 3, 4), (1, 2, 3)))
    assert gathered.losses().keys == (((0.0,) * 4,) * 2,) * 2  # nothing lost by nobody
    heads, layers = rng.lognormal(0, 1, (2, 2)), rng.lognormal(0, 1, (2, 4))
    squares = rng.lognormal(0, 1, (2, 4))
    gathered.sums["keys.heads"], gathered.sums["keys.layers"] = heads, layers.copy()
    gathered.sums["keys.squares"] = squares
    gathered.sums["alone"] += 2
    found = np.asarray(gathered.losses().keys)
    layers[:, 3] = layers[:, 2] * squares[:, 3] / squares[:, 2]
    np.testing.assert_allclose(found.sum(axis=1), layers / 2, rtol=1e-12)
    ratio = found[:, 0] / found[:, 1]
    np.testing.assert_allclose(ratio, (heads[:, 0] / heads[:, 1])[:, None] * np.ones(4), rtol=1e-12)


def test_the_allocation_reaches_the_ratio_and_loses_less_than_uniform_bits(known):
    found, _ = known
    config = replace(CONFIG, allocation=found.study.allocation)
    assert compression_ratio(config, 4096) >= 8.0
    losses = found.study.losses
    assert found.study.predicted == pytest.approx(losses.of(found.study.allocation))
    uniform = replace(CONFIG, allocation=Allocation((1, 1), (1, 1)))
    assert compression_ratio(uniform, 4096) >= 8.0
    assert found.study.predicted <= losses.of(Allocation((1, 1), (1, 1)))
    assert found.study.measured > 0
    loss = 2 * found.study.predicted
    fewer = fitting.fit_loss(CONFIG, losses, loss, 4096)
    assert losses.of(fewer) <= loss
    assert compression_ratio(replace(CONFIG, allocation=fewer), 4096) > 8.0
    with pytest.raises(ValueError, match="ratio: got 100"):
        fitting.fit_ratio(CONFIG, losses, 100, 4096)
    with pytest.raises(ValueError, match="kl: got 1e-12"):
        fitting.fit_loss(CONFIG, losses, 1e-12, 4096)


def test_a_loss_that_was_asked_for_is_kept_where_it_is_judged(checkpoint, texts, known, tmp_path):
    """With more bits, and no less than the target needs, where the prediction was too low."""
    before = known[0].study
    plan = replace(PLAN, ratio=None, kl=0.7 * before.measured)
    study = calibrate.calibrate(checkpoint, texts, plan, tmp_path / "tiny", quiet).study
    assert study.measured <= plan.kl and study.target.startswith("KL at most")
    assert sum(study.allocation.means) > sum(before.allocation.means)
    with pytest.raises(ValueError, match="kl: got"):
        plan = replace(plan, kl=1e-9)
        calibrate.calibrate(checkpoint, texts, plan, tmp_path / "tiny", quiet)
    with pytest.raises(ValueError, match="target: got"):
        replace(PLAN, kl=0.1)


def test_it_goes_on_wherever_it_was_stopped(checkpoint, texts, known, tmp_path, monkeypatch):
    """Stopped at every file that it writes, before or after it is there, layers among them."""
    out, write = tmp_path / "tiny.safetensors", files.write
    monkeypatch.setattr(gathered, "EVERY", 0.0)

    def stopping(path, arrays, facts, *, after):
        if after:
            write(path, arrays, facts)
        raise KeyboardInterrupt

    stops = 0
    with monkeypatch.context() as patched:
        for after in (False, *[True] * 9, False):
            patched.setattr(files, "write", partial(stopping, after=after))
            with pytest.raises(KeyboardInterrupt):
                calibrate.calibrate(checkpoint, texts, PLAN, out, quiet)
            stops += 1
            assert not out.exists()
    assert stops == 11
    calibrate.calibrate(checkpoint, texts, PLAN, out, quiet)
    assert_same(load_calibration(out), known[0])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_another_call_left_is_refused(checkpoint, texts, tmp_path, monkeypatch):
    out, write = tmp_path / "tiny.safetensors", files.write

    def stopping(path, arrays, facts):
        write(path, arrays, facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            calibrate.calibrate(checkpoint, texts, PLAN, out, quiet)
    with pytest.raises(ValueError, match=r"partial: got what a calibration of another model"):
        calibrate.calibrate(checkpoint, texts[:1], PLAN, out, quiet)
    with pytest.raises(ValueError, match="texts: got none of two times 1000 tokens"):
        windows(texts, 1000, 3)


def test_a_file_comes_back_and_is_refused_where_it_does_not_belong(checkpoint, known, tmp_path):
    found, out = known
    again = load_calibration(out)
    assert_same(again, found)
    save_calibration(again, tmp_path / "copy")
    assert_same(load_calibration(tmp_path / "copy"), found)
    require_calibrated(again, MODEL, checkpoint.model)
    other = unstack(jax.jit(lambda: Llama(MODEL, nnx.Rngs(1), jnp.float32))())
    with pytest.raises(ValueError, match="calibration of tiny: got key weights"):
        require_calibrated(again, MODEL, other)
    with pytest.raises(ValueError, match=r"got \(2, 2, 16\) layers, heads and channels, expected"):
        require_calibrated(again, replace(MODEL, num_layers=3))
    with pytest.raises(ValueError, match="without a study"):
        save_calibration(Calibration(keys=found.keys), tmp_path / "none")
    data = bytearray(out.read_bytes())
    data[-5] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(ValueError, match="do not match their SHA-256"):
        load_calibration(tmp_path / "damaged")
    with pytest.raises(FileNotFoundError, match="expected a calibration"):
        load_calibration(tmp_path / "nothing")
    size = int.from_bytes(data[:8], "little")
    facts = json.loads(json.loads(bytes(data[8 : 8 + size]))["__metadata__"]["study"])
    assert facts["model"] == "tiny" and facts["target"].startswith("8 times at 4,096")


def test_the_digest_is_that_of_the_weights_however_they_lie():
    stacked = jax.jit(lambda: Llama(MODEL, nnx.Rngs(0), jnp.float32))()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stacked)
    assert key_digest(stacked) == key_digest(unstack(stacked)) == key_digest(unstack(rounded))


def test_an_error_is_that_of_the_codec():
    x = np.random.default_rng(3).normal(size=(30, 2, 16)).astype(np.float32)
    off = error(CodecConfig(8), jax.random.key(0), None, x)
    assert 0 < float(jnp.linalg.norm(off) / np.linalg.norm(x)) < 0.02
