"""A saved cache comes back bit by bit, or not at all."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax import cache
from turboquant_jax.cache.storage import restore, save

CONFIG = cache.CacheConfig(
    2, 1, 8, cache.CodecConfig(3, "haar"), cache.CodecConfig(1), block=8, window=3, sinks=1
)


@partial(jax.jit, static_argnums=(0, 1))
def make(config=CONFIG, capacity=30):
    return cache.create(config, 2, capacity, key=jax.random.key(4))


def filled(state, seed=0):
    rng = np.random.default_rng(seed)

    def some(leaf):
        if leaf.dtype.kind in "iub":
            most = 2 if leaf.dtype == bool else np.iinfo(leaf.dtype).max
            return jnp.asarray(rng.integers(0, most, leaf.shape).astype(leaf.dtype))
        return jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype))

    return jax.tree.map(some, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "prompt.safetensors"
    state = filled(make())
    save(state, path, model="smollm2-135m")
    return state, path


def test_it_comes_back_bit_by_bit(saved, same_bits):
    state, path = saved
    same_bits(restore(make(), path, model="smollm2-135m"), state)
    shapes = jax.eval_shape(make)
    same_bits(restore(shapes, path, model="smollm2-135m"), state)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_a_cache_without_blocks_sinks_or_mean_comes_back(tmp_path, same_bits):
    config = replace(CONFIG, sinks=0, window=40, center_keys=False)
    state = filled(make(config))
    save(state, tmp_path / "small", model="m")
    same_bits(restore(make(config), tmp_path / "small", model="m"), state)


def test_keys_with_a_sketch_come_back(tmp_path, same_bits):
    """Of another kind of sketch it is another config; which kind the others would have is not."""
    config = replace(CONFIG, key=replace(CONFIG.key, code="prod"))
    state = filled(make(config))
    save(state, tmp_path / "prod", model="m")
    same_bits(restore(make(config), tmp_path / "prod", model="m"), state)
    gaussian = replace(config, key=replace(config.key, sketch="gaussian"))
    with pytest.raises(ValueError, match="got config"):
        restore(jax.eval_shape(lambda: make(gaussian)), tmp_path / "prod", model="m")


def test_scales_of_8_bits_come_back(tmp_path, same_bits):
    config = replace(CONFIG, scale_bits=8)
    state = filled(make(config))
    save(state, tmp_path / "short", model="m")
    same_bits(restore(make(config), tmp_path / "short", model="m"), state)
    with pytest.raises(ValueError, match="got config"):
        restore(jax.eval_shape(make), tmp_path / "short", model="m")


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_side_in_full_precision_comes_back(side, tmp_path, same_bits):
    config = replace(CONFIG, **{side: cache.CodecConfig(16)})
    state = filled(make(config))
    save(state, tmp_path / "half", model="m")
    same_bits(restore(make(config), tmp_path / "half", model="m"), state)
    with pytest.raises(ValueError, match="got config"):
        restore(jax.eval_shape(make), tmp_path / "half", model="m")


def test_what_a_file_says_of_other_codes_does_not_know_of_sketches(saved):
    header = saved[1].read_bytes()
    assert b"scalar" in header and b"sketch" not in header and b"scale_bits" not in header


@pytest.mark.parametrize(
    ("like", "model", "says"),
    [
        (lambda: make(), "llama-3-8b", "got model smollm2-135m, expected llama-3-8b"),
        (lambda: make(replace(CONFIG, window=4)), "smollm2-135m", "got config"),
        (lambda: make(replace(CONFIG, dtype="float16")), "smollm2-135m", "got config"),
        (lambda: make(capacity=31), "smollm2-135m", "got config"),
        (
            lambda: cache.create(CONFIG, 3, 30, key=jax.random.key(4)),
            "smollm2-135m",
            "got arrays",
        ),
        (
            lambda: cache.create(CONFIG, 2, 30, key=jax.random.key(4), num_pages=3),
            "smollm2-135m",
            "got arrays",
        ),
    ],
    ids=["model", "window", "dtype", "capacity", "batch", "pages"],
)
def test_what_belongs_elsewhere_is_refused(saved, like, model, says):
    with pytest.raises(ValueError, match=says):
        restore(jax.eval_shape(like), saved[1], model=model)


def test_other_levels_are_another_config(saved):
    state, path = saved
    (part,) = state.parts
    key, value = part.codecs
    group = replace(key.groups[0], levels=tuple(1.01 * x for x in key.groups[0].levels))
    part = replace(part, codecs=(replace(key, groups=(group,)), value))
    other = replace(state, parts=(part,))
    with pytest.raises(ValueError, match="got config"):
        restore(other, path, model="smollm2-135m")


def test_a_file_cut_anywhere_is_refused(saved, tmp_path):
    whole = saved[1].read_bytes()
    like, cut = jax.eval_shape(make), tmp_path / "cut"
    for size in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut"):
            restore(like, cut, model="smollm2-135m")
    cut.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="cut"):
        restore(like, cut, model="smollm2-135m")


def test_a_flipped_bit_anywhere_is_refused(saved, tmp_path, same_bits):
    """Or changes nothing: a few bits of the header, such as its padding, say nothing."""
    state, path = saved
    whole = path.read_bytes()
    like, bad = jax.eval_shape(make), tmp_path / "flipped"
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(2)
    places = [*range(0, header, 7), *rng.integers(header, len(whole), 200)]
    refused = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        bad.write_bytes(data)
        try:
            found = restore(like, bad, model="smollm2-135m")
        except ValueError as error:
            refused += 1
            assert "flipped" in str(error)
        else:
            assert place < header
            same_bits(found, state)
    assert refused >= len(places) - 5


def test_other_files_are_refused(saved, tmp_path):
    like = jax.eval_shape(make)
    with pytest.raises(FileNotFoundError, match="no such file"):
        restore(like, tmp_path / "missing", model="m")
    with pytest.raises(FileNotFoundError, match="no such file"):
        restore(like, tmp_path, model="m")
    (tmp_path / "text").write_text(json.dumps({"format": "turboquant-jax cache 1"}))
    with pytest.raises(ValueError, match="expected a saved cache"):
        restore(like, tmp_path / "text", model="m")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="got format None"):
        restore(like, tmp_path / "weights.safetensors", model="m")
    older = {"format": "turboquant-jax cache 1", "model": "m"}
    save_file({"x": np.zeros(3)}, tmp_path / "older", older)
    with pytest.raises(ValueError, match=r"0\.1, .* prefill its prompt and save it again"):
        restore(like, tmp_path / "older", model="m")


def test_a_failed_save_leaves_the_old_file(saved, tmp_path, monkeypatch, same_bits):
    state, _ = saved
    path = tmp_path / "prompt"
    save(state, path, model="m")

    def full_disk(arrays, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("turboquant_jax.cache.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(filled(make(), seed=1), path, model="m")
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"]
    same_bits(restore(make(), path, model="m"), state)
