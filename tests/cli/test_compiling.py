"""Where compiled programs are kept: by flag, by variable, by JAX's variable, by default."""

from pathlib import Path

import jax
import pytest

from turboquant_jax.cli import compiling

FOLDER = "jax_compilation_cache_dir"


def test_the_flag_comes_first_then_our_variable_then_jax_s(tmp_path):
    ours, theirs = {compiling.VARIABLE: str(tmp_path / "b")}, {"JAX_COMPILATION_CACHE_DIR": "c"}
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    a = str(tmp_path / "a")
    assert compiling.settings(a, ours | theirs | home)[FOLDER] == a
    assert compiling.settings("off", ours | theirs | home) == {FOLDER: None}
    assert compiling.settings(None, ours | theirs | home)[FOLDER] == str(tmp_path / "b")
    assert compiling.settings(None, {compiling.VARIABLE: "off"} | home) == {FOLDER: None}
    assert compiling.settings(None, theirs | home) == {}
    default = tmp_path / "turboquant-jax"
    assert compiling.settings(None, home)[FOLDER] == str(default)
    assert default.stat().st_mode & 0o777 == 0o700, "what lies in it is run"


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder or off"):
        compiling.settings(str(tmp_path / "file" / "x"), {})
    assert compiling.settings(None, {"XDG_CACHE_HOME": str(tmp_path / "file")}) == {}
    assert "compiled programs are not kept" in capsys.readouterr().err


def test_what_is_compiled_is_kept_and_found_again(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    found = []
    jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
    for _ in range(2):
        jax.clear_caches()
        with compiling.kept(str(tmp_path)):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.jit(lambda x: x * 3 + 17)(2.0).block_until_ready()
        hits = found.count("/jax/compilation_cache/cache_hits")
    assert any(Path(tmp_path).iterdir()) and hits >= 1
    assert jax.config.jax_compilation_cache_dir == before
    with compiling.kept("off"):
        assert jax.config.jax_compilation_cache_dir is None


def test_items_are_the_same_with_progress():
    assert list(compiling.awaited(iter(range(5)), "count")) == list(range(5))
    assert list(compiling.awaited([1], "count")) == [1]
