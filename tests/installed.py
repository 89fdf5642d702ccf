"""What a wheel has to bring: `make package` runs this where the wheel is installed, and no source.

Every module but those of torch is imported, the texts and type markers are there, the command runs.
"""

import importlib
import pkgutil
import sys
from importlib import metadata, resources
from pathlib import Path

import pallas_kernels
import turboquant_jax
from turboquant_jax import cli

here = Path(sys.prefix)
TORCH = "turboquant_jax.pytorch", "turboquant_jax.vllm"
modules = 0
for package in (turboquant_jax, pallas_kernels):
    assert here in Path(package.__file__).parents, f"{package.__file__} is not of this environment"
    assert resources.files(package).joinpath("py.typed").is_file()
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.startswith(TORCH) and "__main__" not in found.name:
            importlib.import_module(found.name)
            modules += 1
assert resources.files("turboquant_jax").joinpath("texts/persuasion.txt").is_file()
asked = ["plan", "--model", "llama-3-8b", "--memory", "24GB", "--bits", "4"]
assert cli.main(asked) == 0
print(f"turboquant-jax {metadata.version('turboquant-jax')}: {modules} modules from the wheel")
