"""A program of its own before `pytorch_speed`: steps of our own decoder, in the same cases.

python -m experiments.speed.decoder_in_jax llama-3-8b 0 64 3 1x4096 8x32768

Prints a row of `llama_speed` at 4 bits, as JSON, for each case. The first is compiled alone, the
others side by side.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from experiments.speed.llama_speed import Bench, Config

BITS = 4


def main(model: str, layers: str, steps: str, repeats: str, *cases: str) -> None:
    """Rows of the cases, in their order, to standard output."""
    bench = Bench(Config(cases, (BITS,), model, int(layers), int(steps), int(repeats)))
    first, *others = (partial(bench.compile_one, case, BITS) for case in cases)
    first()  # and the weights are drawn, once: what threads ask for first, each of them would draw
    with ThreadPoolExecutor() as pool:
        for compiled in [pool.submit(one) for one in others]:
            compiled.result()
    for case in cases:
        for row in bench.measure(case, BITS, []):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
