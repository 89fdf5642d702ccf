"""Which bytes Triton gives to a thread: a look-up takes four neighbours of one row."""

from dataclasses import replace
from unittest import mock

import pytest

from tests.pytorch.skip import torch

triton = pytest.importorskip("triton", reason="needs the Triton that torch ships for GPUs")
from triton._C.libtriton import ir  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402

from tests.pytorch import calls  # noqa: E402
from turboquant_jax.cache.config import CodecConfig  # noqa: E402
from turboquant_jax.cache.presets import preset as preset_config  # noqa: E402
from turboquant_jax.pytorch import choose, creation, plan_store, runner, triton_compile  # noqa: E402
from turboquant_jax.pytorch.binary import Binary  # noqa: E402
from turboquant_jax.pytorch.segments import Scores  # noqa: E402

LAYOUTS = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [8, 4], warpsPerCTA = [1, 1], order = [1, 0]}>
#blocked1 = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [32, 1], warpsPerCTA = [1, 1], order = [0, 1]}>
#linear = #ttg.linear<{register = [[0, 1], [0, 2], [8, 0]], lane = [[0, 4], [1, 0]], warp = [], block = []}>
#blocked2 = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [2, 16], warpsPerCTA = [1, 1], order = [1, 0]}>
#blocked3 = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [32, 1], warpsPerCTA = [1, 2], order = [0, 1]}>
#blocked4 = #ttg.blocked<{sizePerThread = [1, 2], threadsPerWarp = [8, 4], warpsPerCTA = [2, 1], order = [1, 0]}>
#linear1 = #ttg.linear<{register = [[0, 4], [0, 1], [0, 2]], lane = [[0, 8], [1, 0]], warp = [], block = []}>
"""  # noqa: E501
LOOK_UP = (
    '%1 = tt.elementwise_inline_asm "shr.b32 $0, $1, $2;" {{packed_element = {} : i32}} %0, %0 : '
    "tensor<32x16xi8, {}>, tensor<32x16xi8, {}> -> tensor<32x16xi8, {}>"
)


@pytest.mark.parametrize(
    "layout, whole",
    [("blocked", 1), ("blocked1", 1), ("linear", 1)]
    + [(name, 0) for name in ("blocked2", "blocked3", "blocked4", "linear1")],
)
def test_a_look_up_has_four_neighbouring_bytes(layout, whole):
    """As the thread's registers follow each other, which the documented layouts of Triton say."""
    names = ["#" + layout] * 3
    assert triton_compile.words_are_whole(LAYOUTS + LOOK_UP.format(4, *names)) == whole
    assert triton_compile.words_are_whole(LAYOUTS + LOOK_UP.format(1, *names))


def ttgir_of(kernel, capability=90):
    """The kernel with the layouts that Triton chooses, which takes a part of the whole way."""
    target = GPUTarget("cuda", capability, 32)
    options = dict(num_warps=kernel.warps, num_stages=kernel.stages, enable_fp_fusion=False)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    text = triton_compile._simplified(kernel.ttir, target, options)
    with triton_compile._file(text) as path:
        module = ir.parse_mlir_module(path, context)
    module.context = context
    return str(backend.make_ttgir(module, {}, backend.parse_options(options), capability))


def configs():
    """Every preset, at heads of SmolLM2-135M and of Llama-3-8B; rows of 8 bytes."""
    for head_dim, kv_heads, heads in ((64, 3, 9), (128, 2, 8)):
        for preset in ("lossless", "balanced", "compact", "max"):
            frequencies = tuple(0.1**i for i in range(head_dim // 2))
            config = preset_config(preset, 1, kv_heads, head_dim, frequencies)
            yield pytest.param(config, heads, id=f"{preset} {head_dim}")
    for name in ("scalar 2", "trellis 2"):
        for heads in (4, 16):
            config = calls.config_of(name, 32, block=32)
            yield pytest.param(config, heads, id=f"{name}, rows of 8 bytes, {heads} heads")


@pytest.mark.slow
@pytest.mark.parametrize("config, heads", [*configs()])
def test_look_ups_of_every_preset_are_whole(config, heads):
    given = calls.recorded(config, heads=heads)["decode_attention"]
    for kernel in plan_store.plan_of(*calls.flat("decode_attention", given)).kernels:
        text = ttgir_of(kernel)
        assert ("packed_element = 4" in text) == (kernel.name == "decode_attention")
        assert triton_compile.words_are_whole(text)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_the_kernel_of_4_bits_keeps_its_warps_and_loads_ahead(batch):
    """The schedule of Llama-3-8B counts on so many programs, each with tiles on their way."""
    config = preset_config("lossless", 1, 8, 128, tuple(0.1**i for i in range(64)))
    config = replace(config, key=CodecConfig(4), value=CodecConfig(4), dtype="bfloat16")
    state, asked = creation.create(config, batch, 2300), []
    heads = tuple(torch.zeros(batch, 1, n, 128, dtype=torch.bfloat16) for n in (32, 8, 8))
    with mock.patch.object(runner, "run", lambda *call: asked.append(call)):
        choose.attend_and_write(state, 0, heads, Scores(), None, "kernels")
    ((name, spec, read, written, _),) = (call for call in asked if call[0] == "decode_attention")
    plan = plan_store.plan_of(name, spec, runner.shapes_of(read), runner.shapes_of(written))
    kernel = plan.kernels[0]
    assert (kernel.name, kernel.warps, kernel.stages) == ("decode_attention", 1, 3)
    assert kernel.grid == (8, 8, batch)  # splits of 35 tiles, kv heads, sequences
    parts = {buffer.shape[:2] for buffer in plan.buffers if buffer.kind == "scratch"}
    assert (8, 8 * batch) in parts  # each sequence has these: splits by length are for XLA alone
    assert "async_copy_global_to_local" in ttgir_of(kernel)
    binary = triton_compile.compile_kernel(kernel.ttir, kernel.warps, kernel.stages, 90)
    assert binary.warps == kernel.warps
    assert binary.spilled <= triton_compile.FEW


@pytest.mark.parametrize(
    ("spilled", "warps"),
    [({2: 0, 4: 0}, 2), ({2: 8, 4: 0}, 2), ({2: 200, 4: 0}, 4), ({2: 200, 4: 300}, 2)],
)
def test_twice_the_warps_are_the_last_resort(spilled, warps, monkeypatch):
    """Half as many programs run at a time then: a few bytes that are put aside cost less."""

    def compiled(text, target, options):
        count = options["num_warps"]
        return Binary("kernel", b"", 0, 1, spilled[count], count)

    monkeypatch.setattr(triton_compile, "_compiled", compiled)
    monkeypatch.setattr(triton_compile, "_simplified", lambda text, *given: text)
    found = triton_compile.compile_kernel.__wrapped__("text", 2, 1, 90)
    assert (found.warps, found.spilled) == (warps, spilled[warps])


MODULE = """
module {
  tt.func public @kernel(%arg0: !tt.ptr<f32>) {
    %0 = tt.load %arg0 : !tt.ptr<f32>
    tt.store %arg0, %0 : !tt.ptr<f32>
    tt.return
  }
}
"""


def test_code_is_found_again_by_another_process():
    """Triton keeps it by its text, in which the file that it was read from has no place."""
    target, options = GPUTarget("cuda", 90, 32), dict(num_warps=1, num_stages=1)
    texts = [triton_compile._simplified(MODULE, target, options) for _ in range(2)]
    assert texts[0] == texts[1] and "tt.load" in texts[0]
