"""How much faster several GPUs are than one: attention over heads and over a context, a decoder.

`attention` is that of a layer for one new token a sequence, 32 query and 8 kv heads of 128 channels
at 4 bits with the mean before RoPE, the layers of a cache one after another in a loop on a device.
`decoder` is a step of greedy decoding with the sizes of Llama-3-8B, random weights in bfloat16, and
`decoder: attention` and the like what the devices spend in such kernels a step, by a profile, in
which a collective counts the time that it waits. `attention16` has 16 layers in a turn of the loop,
not 2: the host launches a turn on every device. `decoder70b` has the sizes of Llama-3-70B; of it
`longest` and `largest32768` are the longest sequence and the largest batch at 32,768 tokens that
fit beside the weights, really allocated and decoded. JAX had 139.6 GB of each of four devices, and
145.6 GB of each of two and for the batch in bfloat16 on four.

After a `+` stands what XLA is asked for: `graphs` collectives in CUDA graphs, `kernels` its own
kernel for small sums, which it takes by itself and which is never in a graph, `gather` that for
gathers too, `nccl` NCCL's sums in graphs, `symmetric` these in symmetric memory, `launches` no
graphs.

Times are of the host around the whole loop, medians. One device runs what it runs without a mesh;
`ratio_to_one` is its time by that of the mesh. Over `tensor` a device has its kv heads, over
`context` its stripes of the tokens; with `tensor+context` the context is split in two.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.harness.experiment import AIM, GPU, Claim, Row, Track, option, where
from experiments.harness.journal import open_journal
from experiments.harness.statistics import met
from experiments.speed import sharded_sizes
from experiments.speed.sharded_attention import Attention
from experiments.speed.sharded_decoder import Decoder, collect
from turboquant_jax.cache.mesh import make_mesh
from turboquant_jax.models import PRESETS, LlamaConfig
from turboquant_jax.models import sharding as model_sharding

NEEDS = GPU
KEYS = ("what", "axis", "devices", "batch", "tokens")
_AIMS = {"attention": 0.85, "decoder": 0.75}
_AIM_OF_TWO = 1.7
LARGE = "decoder70b"


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: tuple[str, ...] = option(
        (
            "attention16 tensor 8x32768",
            "attention16 context 1x1048576",
            "attention16 tensor+context 8x32768",
            "decoder tensor 8x32768",
            "decoder tensor+context 8x32768",
            "decoder70b tensor 8x32768",
            "longest tensor bf16",
            "largest32768 tensor bf16",
            "longest tensor 4",
            "largest32768 tensor 4",
            "longest tensor max",
            "largest32768 tensor max",
        ),
        "what, axis, batch x tokens or cache",
    )
    devices: tuple[int, ...] = option((1, 2, 4), "devices of the mesh, one first")
    layers: int = option(2, "layers of the cache, of attention")
    model: str = option("llama-3-8b", "preset whose sizes the decoder has")
    large: str = option("llama-3-70b", "preset whose largest past is looked for")
    depth: int = option(0, "layers of the decoders instead of their presets', if not 0")
    steps: int = option(32, "turns of a loop")
    large_steps: int = option(8, "turns of a loop of the large decoder")
    repeats: int = option(5, "timed loops; their median counts")
    seconds: float = option(0.0, "start no case after so long, 0 for never")
    only: str = option("", "compile: programs for a cache of them", ("", "compile"))


SMOKE = Config(
    ("attention tensor 2x200", "decoder tensor 1x300"),
    (1,),
    1,
    "smollm2-135m",
    "smollm2-135m",
    1,
    2,
    2,
    1,
)


def run(config: Config, track: Track) -> Iterator[Row]:
    """Every case with every number of devices."""
    journal, bench = (
        open_journal("sharded_speed", config, ("cases", "devices", "only")),
        Bench(config),
    )
    every = [
        (case, devices)
        for case in config.cases
        for devices in config.devices
        if bench.has(case, devices)
    ]
    rows: list[Row] = []
    for case, devices in track(every, "sharded_speed"):
        if config.only == "compile":
            bench.compile(case, devices)
            continue
        fresh = journal.measure(f"{case} on {devices}", partial(bench.measure, case, devices))
        rows += fresh
        for row in fresh:
            one = base(rows, row)
            ratio = {"ratio_to_one": one["milliseconds"] / row["milliseconds"]} if one else {}
            yield row | ratio


def base(rows: Sequence[Row], row: Row) -> Row | None:
    """The row of one device for one of several."""
    what = re.sub(r"\+\w+", "", row["what"])
    sizes = {key: row[key] for key in ("batch", "tokens")}
    return next(iter(where(rows, what=what, devices=1, **sizes)), None)


def mesh_of(axis: str, devices: int) -> Mesh | None:
    """The mesh of so many devices; None for one. Of both axes the context is split in two."""
    if devices == 1:
        return None
    if axis == "tensor+context":
        return make_mesh(tensor=devices // 2, context=2)
    return make_mesh(**{axis: devices})


class Bench:
    """Measures one case at a time; the large decoder's weights stay on the devices."""

    def __init__(self, config: Config):
        self.config = config

    def has(self, case: str, devices: int) -> bool:
        """Whether the case is one for so many devices."""
        what, axis, _ = case.split()
        if _is_size(what):
            return devices == max(self.config.devices) > 1
        if what.startswith(LARGE):
            return devices == max(self.config.devices)
        return devices >= (4 if "+" in axis else 2 if "+" in what else 1)

    def llama(self, preset: str) -> LlamaConfig:
        """A decoder's sizes."""
        found = PRESETS[preset]
        return replace(found, num_layers=self.config.depth or found.num_layers)

    @cached_property
    def weights(self) -> Any:
        """Of the large decoder, over `tensor`."""
        mesh = make_mesh(tensor=max(self.config.devices))
        made = model_sharding.random_model(self.llama(self.config.large), 0, mesh)
        return jax.block_until_ready(made)

    def decoder(self, case: str, devices: int) -> Decoder:
        """The decoder of a case of a given size."""
        what, axis, size = case.split()
        name, _, compiler = what.partition("+")
        config, large = self.config, name == LARGE
        llama = self.llama(config.large if large else config.model)
        batch, tokens = map(int, size.split("x"))
        return Decoder(
            llama, sharded_sizes.cache_config(llama, "4"), mesh_of(axis, devices), batch, tokens,
            config.large_steps if large else config.steps, compiler,
        )  # fmt: skip

    def attention(self, case: str, devices: int) -> Attention:
        """The attention of a case."""
        what, axis, size = case.split()
        batch, tokens = map(int, size.split("x"))
        name, _, compiler = what.partition("+")
        layers = int(name.removeprefix("attention") or self.config.layers)
        mesh = mesh_of(axis, devices)
        return Attention(mesh, batch, tokens, layers, self.config.steps, compiler)

    def compile(self, case: str, devices: int) -> None:
        """Compile the loop of a case; nothing of its size is allocated."""
        what, axis, size = case.split()
        config = self.config
        if _is_size(what):
            llama, mesh = self.llama(config.large), make_mesh(**{axis: devices})
            sharded_sizes.planned(llama, mesh, what, size, config.large_steps).compiled()
        elif what.startswith("attention"):
            self.attention(case, devices).compiled()
        else:
            self.decoder(case, devices).compiled()

    def measure(self, case: str, devices: int) -> list[Row]:
        """The rows of a case; none where it does not fit the devices."""
        what, axis, size = case.split()
        config, parts = self.config, dict[str, float]()
        if _is_size(what):
            llama, name = self.llama(config.large), f"{what}, {size}"
            mesh = make_mesh(**{axis: devices})
            found = sharded_sizes.largest(
                llama, mesh, what, size, config.large_steps, lambda: self.weights
            )
            if found is None:
                return []
            decoder, seconds = found
            batch, tokens, what = decoder.batch, decoder.tokens, name
        else:
            batch, tokens = map(int, size.split("x"))
            if what.startswith("attention"):
                seconds = self.attention(case, devices).seconds(config.repeats)
            else:
                decoder = self.decoder(case, devices)
                large = what.startswith(LARGE)
                model = self.weights if large else decoder.make_model()
                loop = decoder.loop(model, decoder.compiled())
                seconds = loop.median(config.repeats)
                parts = loop.parts() if jax.default_backend() == "gpu" else {}
                del loop, model
        collect()
        same = {"axis": axis, "devices": devices, "batch": batch, "tokens": tokens}
        every = {what: seconds} | {f"{what}: {kind}": each for kind, each in parts.items()}
        return [{"what": k} | same | {"milliseconds": 1e3 * v} for k, v in every.items()]


def _is_size(what: str) -> bool:
    return what.startswith(("longest", "largest"))


def claims(rows: Sequence[Row]) -> list[Claim]:
    """A claim for every row of several devices that has one of a single device."""
    found = []
    for row in rows:
        aims, one = _AIMS.get(row["what"].rstrip("0123456789")), base(rows, row)
        if row["devices"] == 1 or aims is None:
            continue
        aim = _AIM_OF_TWO if row["devices"] == 2 else aims * row["devices"]
        what = f"{row['what']} over {row['axis']}, {row['batch']} x {row['tokens']}"
        found.append(
            Claim(
                AIM,
                f"{what}: {row['devices']} devices at least {aim:g} times as fast as one",
                f"{row['ratio_to_one']:.2f} times: {row['milliseconds']:.3f} ms, "
                f"{row['ratio_to_one'] * row['milliseconds']:.3f} ms on one in the same run"
                if one
                else "no row of one device",
                met(one is not None and row["ratio_to_one"] >= aim),
            )
        )
    return found
