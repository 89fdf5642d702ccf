"""The operators: what torch knows of them, and those that `test_kernels` does not run on a CPU."""

import ctypes

import numpy as np
import pytest

from tests.layout import unpack
from tests.pytorch.skip import torch
from turboquant_jax.pytorch import cuda_driver, operands, operators, plan, runner
from turboquant_jax.quantizers import trellis


@pytest.fixture(scope="module")
def small():
    """A call of the rotation: q, and +-1 with the gain of a Hadamard matrix."""
    torch.manual_seed(0)
    parts = torch.sign(torch.randn(1, 1, 64, 64)).bfloat16()
    rotation = operands.RotationOperand(parts=parts, signs=None, gain=0.125)
    return torch.randn(2, 4, 64).bfloat16(), rotation


def test_decode_unpacks_what_the_layout_says():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (2, 3, 32, 8), dtype=np.uint8)  # 16 channels of 4 bits
    values = rng.integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    scales = rng.uniform(0.5, 2, (2, 2, 3, 32)).astype(np.float32).view(np.uint32) >> 16
    levels = np.array([*range(-9, 0), *range(7)])
    book = operands.CodebookOperand(bits=4, levels=tuple(levels.tolist()), step=0.5)
    blocks = operands.BlocksOperand(
        keys=((torch.from_numpy(keys),),),
        values=((torch.from_numpy(values),),),
        scales=(torch.from_numpy((scales[1] << 16 | scales[0]).astype(np.uint32)),),
        key_codebooks=(book,),
        value_codebooks=(book,),
    )
    pages, rows = (torch.tensor(x, dtype=torch.int32) for x in ([2, 0, 2, 1], [1, 0]))
    found = operators.decode((blocks,), pages, rows, dtype=torch.float32)
    size = (scales << 16).astype(np.uint32).view(np.float32)
    numbers = unpack([keys], [4], 16), unpack([values], [4], 32).swapaxes(-1, -2)
    for got, number, own in zip(found, numbers, size, strict=True):
        vectors = 0.5 * levels[number] * own[..., None]
        want = vectors[np.array([1, 0])][:, np.array([2, 0, 2, 1])]
        np.testing.assert_allclose(got, np.moveaxis(want, 0, 2), rtol=1e-6)


def test_search_is_the_definition():
    vectors = np.random.default_rng(1).normal(0, 1, (20, 16)).astype(np.float32)
    levels = trellis.grid_levels(2)
    got = operators.trellis_encode(torch.from_numpy(vectors.T.copy()), levels.tolist())
    want = trellis.search(vectors, levels, implementation="xla")
    np.testing.assert_array_equal(got.numpy().T, want)


def test_rope_turns_pairs_by_their_angles(small):
    """As complex numbers, in float64; then the rotation."""
    _, rotation = small
    rng = np.random.default_rng(2)
    qkv, angle = rng.normal(0, 1, (2, 2, 4, 64)), rng.uniform(0, 6, (2, 32))
    qkv = torch.from_numpy(qkv).bfloat16()
    cos, sin = (torch.from_numpy(f(angle)).float() for f in (np.cos, np.sin))
    q, k, v, rotated = operators.rope_and_rotate(qkv, cos, sin, rotation)
    x = qkv.double().numpy()
    pairs = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angle)[:, None, None]
    turned = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(q.double().reshape(2, 2, 2, 64), turned[:, :, :2], atol=0.02)
    np.testing.assert_allclose(k.double(), turned[:, :, 2], atol=0.02)
    assert torch.equal(v, qkv[:, :, 3])
    matrix = 0.125 * rotation.parts[0, 0].double()
    np.testing.assert_allclose(rotated.double(), q.double() @ matrix.T, atol=1e-4)


def test_rotated_means_are_products():
    rng = np.random.default_rng(3)
    means, parts = rng.normal(0, 1, (6, 2, 24)), rng.normal(0, 1, (3, 3, 1, 8, 8))
    means, parts = (torch.from_numpy(x).float() for x in (means, parts))
    groups = [
        operands.GroupOperand(planes=(), rotation=operands.RotationOperand(parts=x), code=None)
        for x in parts
    ]
    own = means.double().unflatten(-1, (3, 8))
    want = torch.einsum("rkgh,goh->rkgo", own, parts[:, :, 0].double().sum(dim=1)).flatten(2)
    torch.testing.assert_close(
        operators.rotated_means(means, groups).double(), want, rtol=1e-5, atol=1e-5
    )


def test_what_torch_knows_of_an_operator(small):
    """Which tensors it writes to, and its results without running it; torch checks both."""
    query, rotation = small
    for operator in (operators.rotate, operators.decode_attention, operators.encode):
        schema = str(operator.run._opoverload._schema)
        assert "Tensor[] read, Tensor(a2!)[] written, Tensor(a3!)[] outputs) -> ()" in schema
    call = operators.rotate.describe(query, rotation)
    spec, read, written = operands.flatten(call.arguments, call.written)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [[mode.from_tensor(x) for x in xs] for xs in (read, written, call.outputs)]
        assert operators.rotate.run(spec, *fakes) is None
    found = torch.library.opcheck(operators.rotate.run, (spec, read, written, list(call.outputs)))
    assert set(found.values()) == {"SUCCESS"}


def test_a_function_of_operators_compiles_whole(monkeypatch, small):
    """And what is written in place is seen by what follows; the kernel is a stand-in."""

    def run(name, spec, read, written, outputs):
        for x in written:
            x.add_(read[0][:1, :1])
        for x in outputs:
            x.fill_(float(written[0].sum()) if written else 1.0)

    monkeypatch.setattr(runner, "run", run)
    query, rotation = small
    window = torch.arange(64.0).repeat(1, 2, 1).bfloat16()
    book = operands.CodebookOperand(bits=1, levels=(-1, 1), step=1.0)

    def step(query, window):
        exact = operands.ExactOperand(
            query=query, keys=(window, query), values=(window + 1, query), write=True
        )
        softmax, blocks = operands.Softmax(scale=0.5), operands.PagedBlocks(pools=(book,))
        output, lse = operators.decode_attention(
            operators.rotate(query, rotation), blocks, softmax, exact=exact
        )
        return output * 2, lse, window.sum()

    def both(function):
        own = window.clone()
        return *function(query, own), own

    eager = both(step)
    for got, want in zip(
        both(torch.compile(step, fullgraph=True, backend="aot_eager")), eager, strict=True
    ):
        assert torch.equal(got, want)
    assert torch.equal(eager[-1], window + 1)  # by the first kernel's output


def test_a_launch_passes_pointers_in_their_order(monkeypatch):
    """To a driver in the place of CUDA's."""
    seen = []

    class Driver:
        def cuLaunchKernel(self, function, *rest):
            *sizes, stream, parameters, extra = rest
            places = ctypes.cast(parameters, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))
            seen.append((function, sizes, stream, [places[i][0] for i in range(3)], extra))
            return 0

    monkeypatch.setattr(cuda_driver, "_library", Driver)
    function = cuda_driver.Function.__new__(cuda_driver.Function)
    function.handle, function.shared = 7, 1024
    launch = cuda_driver.Launch(function, (2, 3, 4), 128, [2**40, 32, 0])
    launch(99)
    launch.pointers[1] = 64
    launch(98)
    sizes = [2, 3, 4, 128, 1, 1, 1024]
    assert seen == [(7, sizes, 99, [2**40, 32, 0], None), (7, sizes, 98, [2**40, 64, 0], None)]


def test_what_is_not_served_is_refused_in_words(small):
    query, rotation = small
    with pytest.raises(NotImplementedError, match="device: got cpu, bound calls are served on cud"):
        operators.rotate.bind(query, rotation)
    with pytest.raises(ValueError, match="expected one 16-bit type"):
        operators.rotate(query.float(), rotation)
    with pytest.raises(ValueError, match="operand: got 'Rotation', expected one that `pallas_ker"):
        operators.rotate(query, operands.Operand("Rotation", **rotation.fields))
    with pytest.raises(ValueError, match="operand: got nan, expected a tensor, a finite number"):
        operands.Softmax(scale=float("nan"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'factor'"):
        operators.rotate(query, operands.RotationOperand(parts=rotation.parts, factor=2.0))


def test_tensors_that_a_plan_does_not_fit_are_refused():
    buffer = plan.Buffer("read", 1, (4, 8), "float32")
    for x, message in (
        (torch.zeros(4, 7), r"read tensor 1: got torch.float32\[4, 7\], expected float32\[4, 8\]"),
        (torch.zeros(4, 8).half(), r"got torch.float16\[4, 8\], expected float32"),
        (torch.zeros(4, 8), "got cpu, expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            runner._check(x, buffer, 0)
