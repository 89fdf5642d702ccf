"""A program of its own before `pytorch_speed`: steps of our own decoder, in the same cases.

python -m experiments.speed.decoder_in_jax llama-3-8b 0 64 3 1x4096 8x32768

Prints a row of `llama_speed` at 4 bits, as JSON, for each case. All cases are compiled first, side
by side. Before that a decoder of one layer is compiled for every batch, alone: XLA times its matrix
products meanwhile, once for each shape.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from experiments.speed.llama_speed import Bench, Config

BITS = 4


def main(model: str, layers: str, steps: str, repeats: str, *cases: str) -> None:
    """Rows of the cases, in their order, to standard output."""
    config = Config(cases, (BITS,), model, int(layers), int(steps), int(repeats))
    bench, small = Bench(config), Bench(replace(config, layers=1))
    for case in {case.split("x")[0]: case for case in cases}.values():
        if small.llama != bench.llama:
            small.compile(case, [BITS])
    del small
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda case: bench.compile_one(case, BITS), cases))
    for case in cases:
        for row in bench.measure(case, BITS, []):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
