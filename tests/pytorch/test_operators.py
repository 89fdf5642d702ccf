"""The operators on CPU tensors, where the kernels are interpreted, against JAX's definition."""

import ctypes

import pytest

pytest.importorskip("torch", reason="needs torch: make test-torch")

import jax
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.pytorch import calls
from turboquant_jax import cache
from turboquant_jax.attention import attend, head_rotation
from turboquant_jax.cache import blocks, compression
from turboquant_jax.cache.choose import Compression
from turboquant_jax.pytorch import cuda_driver, operands, operators, plan, runner
from turboquant_jax.quantizers import trellis

HEADS = 4


@pytest.fixture(scope="module")
def made():
    return calls.real("mean before RoPE 4", 64, HEADS)


@pytest.fixture(scope="module")
def small():
    """A call of the rotation: q, and +-1 with the gain of a Hadamard matrix."""
    torch.manual_seed(0)
    parts = torch.sign(torch.randn(1, 1, 64, 64)).bfloat16()
    rotation = operands.RotationOperand(parts=parts, signs=None, gain=0.125)
    return torch.randn(2, 4, 64).bfloat16(), rotation


def equal(tensor, array):
    np.testing.assert_array_equal(
        tensor.float().numpy(), np.asarray(array, np.float32).reshape(tensor.shape)
    )


def test_attention_is_the_definition_and_writes_the_newest_token(made):
    state, (q, k, v), found = made
    arguments, named = calls.copied(found["decode_attention"])
    output, lse = operators.decode_attention(*arguments, **named)

    want = np.asarray(attend(state, 0, q, k, v, implementation="xla"), np.float32)[:, 0]
    error = np.linalg.norm(output.float().numpy() - want, axis=-1)
    # 15-bit integers in the kernel, and two outputs in bfloat16
    assert np.max(error / np.linalg.norm(want, axis=-1)) <= 1e-2
    assert lse.isfinite().all()
    written = cache.write(state, 0, k, v, implementation="xla")
    for i, segment in enumerate((written.sinks, written.window)):
        equal(named["exact"].keys[i], segment.keys)
        equal(named["exact"].values[i], segment.values)


def test_encode_is_the_definition(made):
    """But for rounding: two sums in float32 may find neighbouring scales or codes at a tie."""
    state, _, found = made
    ((_, _, _, pool), _) = given = calls.copied(found["encode"])
    operators.encode(*given[0])
    want = compression.compress_single(state, Compression("xla", "xla"))
    (before,), (after,) = state.parts, want.parts

    def planes(groups):
        return [plane.numpy() for group in groups for plane in group.planes]

    got = [*planes(pool.keys), *planes(pool.values), pool.scales[0].numpy()]
    for x, old, new in zip(
        got, jax.tree.leaves(before.pool), jax.tree.leaves(after.pool), strict=True
    ):
        changed = np.asarray(old) != np.asarray(new)
        assert changed.mean() > 0.03  # two of the pages of every head
        assert (x.reshape(new.shape) != np.asarray(new)).mean() < 2e-3
    np.testing.assert_allclose(
        pool.key_mean.numpy(), np.asarray(want.key_mean)[0], rtol=1e-5, atol=1e-6
    )


def test_decode_and_rotate_are_the_definition(made):
    state, (q, _, _), found = made
    (part,) = state.parts
    keys, _ = operators.decode(*found["decode"][0], **found["decode"][1])
    (index, scale), *_ = blocks.unpack(part.codecs, part.pool)[0]
    levels = np.asarray(part.codecs[0].groups[0].levels)
    vectors = levels[np.asarray(index)] * np.asarray(scale, np.float32)[..., None]
    page = np.asarray(state.table.page_table).ravel()
    want = np.moveaxis(vectors.reshape(2, -1, *vectors.shape[-2:])[:, page], 0, 2)
    np.testing.assert_allclose(keys.float().numpy(), want, rtol=2**-8)

    rotated = operators.rotate(*found["rotate"][0])
    want = head_rotation.rotate_queries(part.codecs[0], np.arange(2), q)[:, 0]
    np.testing.assert_allclose(rotated.numpy(), want, rtol=1e-5, atol=1e-5)


def test_search_is_the_definition():
    vectors = np.random.default_rng(1).normal(0, 1, (20, 16)).astype(np.float32)
    levels = trellis.grid_levels(2)
    got = operators.trellis_encode(torch.from_numpy(vectors.T.copy()), levels.tolist())
    want = trellis.search(vectors, levels, implementation="xla")
    np.testing.assert_array_equal(got.numpy().T, want)


def test_rope_turns_pairs_by_their_angles(small):
    """As complex numbers, in float64."""
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


def test_rotated_means_are_those_of_jax():
    rng = np.random.default_rng(3)
    means, parts = rng.normal(0, 1, (6, 2, 24)), rng.normal(0, 1, (2, 3, 1, 8, 8))
    parts = [*parts, rng.normal(0, 1, (3, 1, 8, 8))]
    means, *parts = (torch.from_numpy(x).float() for x in (means, *parts))
    groups = [
        operands.GroupOperand(planes=(), rotation=operands.RotationOperand(parts=x), code=None)
        for x in parts
    ]
    want = np.concatenate(
        [
            means[..., 8 * i : 8 * i + 8].double().numpy() @ x[:, 0].double().numpy().sum(axis=0).T
            for i, x in enumerate(parts)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(operators.rotated_means(means, groups), want, rtol=1e-5, atol=1e-5)


def test_schemas_and_fakes(made, small):
    """Every operator says what it writes to, and its results are known without running it."""
    for name, (arguments, named) in made[2].items():
        operator = getattr(operators, name)
        call = operator.describe(*arguments, **named)
        spec, read, written = operands.flatten(call.arguments, call.written)
        with FakeTensorMode() as mode:
            fakes = [[mode.from_tensor(x) for x in xs] for xs in (read, written, call.outputs)]
            assert operator.run(spec, *fakes) is None
    query, rotation = small
    call = operators.rotate.describe(query, rotation)
    spec, read, written = operands.flatten(call.arguments, call.written)
    found = torch.library.opcheck(operators.rotate.run, (spec, read, written, list(call.outputs)))
    assert set(found.values()) == {"SUCCESS"}
    schema = str(torch.ops.turboquant.encode.default._schema)
    assert "Tensor(a2!)[] written, Tensor(a3!)[] outputs" in schema


def test_a_function_of_operators_compiles_whole(made):
    """The window that is written in place, too, and what is read from it behind."""
    arguments, named = made[2]["decode_attention"]

    def step(query, window):
        exact = operands.Operand("ExactOperand", **named["exact"].fields)
        exact.fields["keys"] = (exact.keys[0], window, exact.keys[2])
        output, lse = operators.decode_attention(
            query, *arguments[1:], **(named | {"exact": exact})
        )
        return output * 2, lse, window.sum()

    def run(function):
        given = calls.copied((arguments[0], named["exact"].keys[1]))
        return *function(*given), given[1]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(step), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(run(compiled)[-1], named["exact"].keys[1])


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
