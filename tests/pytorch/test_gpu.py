"""The operators on a GPU are the JAX kernels: interpreted, and on the same GPU where jax has it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.pytorch.skip import torch
from turboquant_jax.pytorch import operands, operators, plan_store

if not torch.cuda.is_available():
    pytest.skip("needs a GPU under torch", allow_module_level=True)
from tests.pytorch import calls

pytestmark = pytest.mark.gpu
NAMES = ("decode_attention", "rotate", "decode", "encode", "trellis_encode")


@pytest.fixture(scope="module", params=["mean before RoPE 4", "scalar 2", "trellis 3"])
def real(request):
    return calls.real(request.param, 128, heads=8)


@pytest.fixture(params=NAMES)
def call(request, real):
    """(operator, its arguments on the GPU)."""
    if request.param not in real:
        pytest.skip("scalar codes are packed by a kernel, of a trellis one finds the paths")
    return getattr(operators, request.param), on_gpu(real[request.param])


def on_gpu(given):
    return calls.mapped(lambda x: x.cuda(), given)


def tensors_of(operator, given):
    """(text, read, written, outputs) of a call."""
    made = operator.describe(*given[0], **given[1])
    return *operands.flatten(made.arguments, made.written), list(made.outputs)


def assert_alike(name, got, want, apart):
    """Bytes and words: all but a share; numbers: to a relative error."""
    for x, y in zip(got, want, strict=True):
        if y is None:
            continue
        if x.is_floating_point():
            x, y = x.double().cpu(), torch.as_tensor(y).double().reshape(x.shape)
            finite = y.isfinite()
            assert torch.equal(finite, x.isfinite())
            error = (x - y)[finite].norm() / y[finite].norm().clamp(min=1e-30)
            assert error <= apart, name
        else:
            x = x.cpu().view(torch.uint8).numpy()
            y = np.ascontiguousarray(y).view(np.uint8).reshape(x.shape)
            assert (x != y).mean() <= apart, name


def turned_of(given):
    """Memory that `encode` turns its means in, and that jax gives back as it was."""
    pool = given[0][-1]
    before_rope = pool.fields.get("pre_rope") if isinstance(pool, operands.Operand) else None
    return None if before_rope is None else before_rope.turned


def test_an_operator_is_the_interpreted_kernel(call):
    operator, given = call
    spec, read, written, outputs = tensors_of(operator, given)
    other = [[x.cpu().clone() for x in some] for some in (read, written, outputs)]
    operator.run(spec, read, written, outputs)
    operator.run(spec, *other)
    torch.cuda.synchronize()
    want = [x if x.is_floating_point() else x.numpy() for x in (*other[1], *other[2])]
    for i, x in enumerate(written):
        if x is turned_of(given):
            want[i] = None
    # sums in another order: outputs in bfloat16, and now and then a code at a tie
    assert_alike(operator.__name__, [*written, *outputs], want, 5e-3)


def test_an_operator_is_the_kernel_of_jax_on_the_same_gpu(call, tmp_path):
    """All bytes; outputs but for what another compiler fuses."""
    operator, given = call
    spec, read, written, outputs = tensors_of(operator, given)
    held = {"name": operator.__name__, "spec": spec, "read": len(read), "written": len(written)}
    for side, some in (("read", read), ("written", written)):
        for i, x in enumerate(some):
            bits = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
            held |= {f"{side}{i}": bits.cpu().numpy(), f"{side}{i}_type": str(x.dtype)[6:]}
    np.savez(tmp_path / "call.npz", **held)
    operator.run(spec, read, written, outputs)
    torch.cuda.synchronize()
    names = [str(tmp_path / name) for name in ("call.npz", "result.npz")]
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda,cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pytorch.jax_on_gpu", *names],
        env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode and "jax" in done.stderr and "cuda" in done.stderr.lower():
        pytest.skip("needs jax with CUDA beside torch")
    assert done.returncode == 0, done.stderr
    with np.load(names[1]) as found:
        want = [found.get(str(i)) for i in range(len(written) + len(outputs))]
    assert_alike(operator.__name__, [*written, *outputs], want, 1e-3)
    if operator is operators.encode:
        integers = [(x, y) for x, y in zip(written, want, strict=True) if not x.is_floating_point()]
        assert integers
        for x, y in integers:
            np.testing.assert_array_equal(x.cpu().view(torch.uint8).numpy(), y.view(np.uint8))


def test_a_captured_call_reads_what_is_there_at_replay(real):
    """Lengths changed in place; the graph's output is that of a call of its own."""
    arguments, named = on_gpu(real["decode_attention"])
    bound, (output, lse) = operators.decode_attention.bind(*arguments, **named)
    bound()  # compiled and loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound()
        inside, _ = operators.decode_attention(*arguments, **named)
    lengths = arguments[1].lengths
    for change in (0, -1):
        lengths += change
        graph.replay()
        want, want_lse = operators.decode_attention(*arguments, **named)
        for got, expected in ((output, want), (lse, want_lse), (inside, want)):
            assert torch.equal(got, expected)
    before = output.clone()
    lengths -= 64
    graph.replay()
    assert not torch.equal(before, output)


def test_a_bound_call_takes_other_tensors(real):
    query, rotation = on_gpu(real["rotate"])[0]
    bound, rotated = operators.rotate.bind(query, rotation)
    other = torch.randn_like(query)
    bound.rebind("read", 0, other)
    bound()
    assert torch.equal(rotated, operators.rotate(other, rotation))
    with pytest.raises(ValueError, match=r"read tensor 0: got torch\.float32"):
        bound.rebind("read", 0, other.float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_operators_compile_whole_on_a_gpu(real):
    query, rotation = on_gpu(real["rotate"])[0]
    compiled = torch.compile(lambda q: operators.rotate(q, rotation) * 2, fullgraph=True)
    assert torch.equal(compiled(query), operators.rotate(query, rotation) * 2)


def test_nothing_spills_on_this_gpu(real):
    """As the driver says it: local memory of the loaded kernels."""
    arguments, named = on_gpu(real["decode_attention"])
    bound, _ = operators.decode_attention.bind(*arguments, **named)
    functions = [function for function, _ in bound._program._kernels]
    assert [function.local_bytes for function in functions] == [0, 0]
    assert len(plan_store._used) > 0
