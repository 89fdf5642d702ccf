"""Importing costs nothing: names are loaded when used, and are those that type checkers see."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("jax", "jaxlib", "numpy", "scipy", "flax", "tokenizers", "gguf", "safetensors", "rich")


PROGRAM = """
import sys
try:
    {}
finally:
    print([name for name in {} if name in sys.modules])
"""


def modules_after(code):
    """Of HEAVY, what a fresh interpreter has imported after running `code`, and its exit status."""
    program = PROGRAM.format(code, HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return ast.literal_eval(done.stdout.splitlines()[-1]), done.returncode


@pytest.mark.parametrize("package", ["turboquant_jax", "turboquant_jax.models"])
def test_the_table_and_the_type_checkers_agree(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    names = [(node.module, alias) for node in block.body for alias in node.names]
    seen = {alias.asname or alias.name: (where, alias.name) for where, alias in names}
    assert seen == module._NAMES
    assert sorted(module.__all__) == sorted(seen) == dir(module)
    for name, (where, attribute) in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(where), attribute)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_importing_the_library_imports_nothing_else():
    code = "import turboquant_jax, turboquant_jax.models, turboquant_jax.models.presets"
    assert modules_after(code) == ([], 0)
    assert "jax" in modules_after("import turboquant_jax as tq; tq.attend")[0]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        ([], 2),
        (["generate", "x", "--nothing"], 2),
        (["generate", "x", "--bits", "9"], 2),
        (["generate", "x", "--preset", "max", "--bits", "4"], 2),
        (["generate", "x", "--model", "llama-3-8b"], 2),
        (["generate", "--prompts", "nowhere.txt"], 2),
        (["generate", "x", "--top-p", "2", "--temperature", "1"], 2),
        (["plan", "--model", "llama-3-8b", "--memory", "24gigs"], 2),
        (["plan", "--model", "llama-9", "--memory", "24GB"], 2),
        (["bench", "--steps", "0"], 2),
        (["demo", "--context", "1"], 2),
    ],
)
def test_help_and_usage_errors_import_nothing_else(arguments, code):
    run = f"from turboquant_jax.cli import main; sys.exit(main({arguments}))"
    assert modules_after(run) == ([], code)


def test_the_module_is_the_command():
    run = [sys.executable, "-m", "turboquant_jax", "--version"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("turboquant-jax 0.")
    assert f"jax {importlib.import_module('jax').__version__}," in done.stdout
