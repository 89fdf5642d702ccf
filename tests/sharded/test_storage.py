"""A cache on a mesh is saved shard by shard, and comes back; whatever is wrong is refused."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.cache import CacheConfig, files, sharding
from turboquant_jax.cache.mesh import make_mesh

CONFIG = CacheConfig(1, 2, 16, block=16, window=8, dtype="bfloat16")
MESH = dict(data=2, tensor=2, context=2)
FIRST, LAST = "shard-00000-of-00008.safetensors", "shard-00007-of-00008.safetensors"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(**MESH)


@pytest.fixture(scope="module")
def held(mesh):
    cache = empty(mesh)
    keys, values = jax.random.normal(jax.random.key(1), (2, 1, 2, 60, 2, 16), jnp.bfloat16)
    return jax.jit(partial(sharding.append, mesh))(cache, keys, values)


@pytest.fixture
def folder(tmp_path, mesh, held):
    sharding.save(mesh, held, tmp_path / "held", model="ours")
    return tmp_path / "held"


def empty(mesh):
    return sharding.create(mesh, CONFIG, 2, 80, key=jax.random.key(0))


def test_comes_back_bit_for_bit_and_goes_on(mesh, held, folder):
    assert sorted(file.name for file in folder.iterdir())[0] == FIRST
    assert [file.name for file in folder.parent.iterdir()] == ["held"]
    found = sharding.restore(mesh, jax.eval_shape(lambda: empty(mesh)), folder, model="ours")
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(new, old)
    token = jnp.ones((1, 2, 1, 2, 16), jnp.bfloat16)
    append = jax.jit(partial(sharding.append, mesh))
    new, old = append(found, token, token), append(held, token, token)
    np.testing.assert_array_equal(new.lengths, old.lengths)
    np.testing.assert_array_equal(new.window.keys, old.window.keys)


def missing(folder, held, mesh):
    (folder / LAST).unlink()


def of_another_save(folder, held, mesh):
    sharding.save(mesh, held, folder.parent / "other", model="ours")
    shutil.copy(folder.parent / "other" / LAST, folder / LAST)


def of_another_place(folder, held, mesh):
    shutil.copy(folder / FIRST, folder / LAST)


def damaged(folder, held, mesh):
    content = bytearray((folder / LAST).read_bytes())
    content[-1] ^= 1
    (folder / LAST).write_bytes(content)


WRONG = {
    missing: (FileNotFoundError, f"got no {LAST}"),
    of_another_save: (ValueError, f"{LAST}: got save"),
    of_another_place: (ValueError, f"{LAST}: got shard 0, expected 7"),
    damaged: (ValueError, f"{LAST}: the contents do not match"),
}


@pytest.mark.parametrize("harm", WRONG, ids=lambda harm: harm.__name__)
def test_a_wrong_shard_is_refused(mesh, held, folder, harm):
    harm(folder, held, mesh)
    error, message = WRONG[harm]
    with pytest.raises(error, match=message):
        sharding.restore(mesh, held, folder, model="ours")


def test_another_model_or_mesh_is_refused(mesh, held, folder):
    with pytest.raises(ValueError, match="got model ours, expected yours"):
        sharding.restore(mesh, held, folder, model="yours")
    other = make_mesh(data=2, tensor=2)
    with pytest.raises(ValueError, match=r"expected shard-00000-of-00004\S*: another mesh"):
        sharding.restore(other, held, folder, model="ours")


def test_nothing_is_half_written(mesh, held, folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    write = files.write

    def fails(path, *content):
        if path.name == LAST:
            raise OSError("no space")
        write(path, *content)

    monkeypatch.setattr(files, "write", fails)
    with pytest.raises(OSError, match="no space"):
        sharding.save(mesh, held, folder, model="theirs")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["held"]


def test_another_folder_is_not_replaced(mesh, held, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="got something else"):
        sharding.save(mesh, held, tmp_path, model="ours")
    assert (tmp_path / "notes.txt").read_text() == "mine"
