"""Runs calls on torch tensors: launch plans on a GPU; on a CPU the kernels, interpreted.

The first call of some shapes makes or finds its plan and compiles it, which takes seconds and
cannot be captured in a CUDA graph; later ones launch on the current stream and never wait.
"""

import functools
from collections.abc import Sequence

import torch

from turboquant_jax.pytorch import cuda_driver, plan_store
from turboquant_jax.pytorch.binary import Binary
from turboquant_jax.pytorch.plan import Buffer, Kernel, Kind, Plan
from turboquant_jax.pytorch.plan_store import Shapes

# What the kernels' loads assume of every pointer, in bytes.
ALIGNMENT = 32


def run(
    name: str,
    spec: str,
    read: list[torch.Tensor],
    written: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> None:
    """One call (`operands.flatten`), which writes to `written` and fills `outputs`."""
    if _device(read, written).type == "cpu":
        from turboquant_jax.pytorch import interpreted  # imports jax

        interpreted.run(name, spec, read, written, outputs)
    else:
        bind(name, spec, read, written, outputs)()


def bind(
    name: str,
    spec: str,
    read: list[torch.Tensor],
    written: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> "Bound":
    """The call with these CUDA tensors, ready to be launched again and again."""
    device = _device(read, written)
    if device.type != "cuda":
        raise NotImplementedError(f"device: got {device}, bound calls are served on cuda")
    program = _program(name, spec, shapes_of(read), shapes_of(written), device.index)
    return Bound(program, {"read": read, "written": written, "output": outputs})


class Bound:
    """A plan with tensors in place of its buffers; launches share its scratch memory.

    So two launches must not run at a time, on two streams.
    """

    def __init__(self, program: "Program", tensors: dict[str, list[torch.Tensor]]):
        self._program, self._index = program, program.device
        held, pointers = program.constants, []
        scratch = {}
        for i, buffer in enumerate(program.plan.buffers):
            if buffer.kind == "constant":
                x = held[i]
            elif buffer.kind == "scratch":
                x = scratch[i] = _empty(buffer, program.device)
            else:
                x = tensors[buffer.kind][buffer.index]
                _check(x, buffer, program.device)
            pointers.append(x.data_ptr())
        self._kept = (tensors, scratch)  # as long as they are pointed at
        self._launches = program.launches(pointers)

    def __call__(self) -> None:
        """Launches the kernels on the current stream of the tensors' device."""
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self()
        stream = torch.cuda.current_stream(self._index).cuda_stream
        for launch in self._launches:
            launch(stream)
        return None

    def rebind(self, kind: Kind, index: int, x: torch.Tensor) -> None:
        """Puts another tensor in the place of one: "read", "written" or "output", and its number.

        As `operands.flatten` numbers them; it must be like the one before.
        """
        number, buffer = self._program.numbers[kind, index]
        _check(x, buffer, self._index)
        self._kept[0][kind][index] = x
        for launch, places in zip(self._launches, self._program.places[number], strict=True):
            for place in places:
                launch.pointers[place] = x.data_ptr()


class Program:
    """A plan compiled and loaded for a device, with its constants there."""

    def __init__(self, plan: Plan, device: int):
        self.plan, self.device = plan, device
        capability = _capability(device)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's context current
            self._kernels = [_load(kernel, capability) for kernel in plan.kernels]
        self.constants = {
            i: _constant(buffer, device)
            for i, buffer in enumerate(plan.buffers)
            if buffer.kind == "constant"
        }
        self.numbers = {
            (buffer.kind, buffer.index): (i, buffer) for i, buffer in enumerate(plan.buffers)
        }
        self.places = [
            [[a for a, b in enumerate(k.arguments) if b == i] for k in plan.kernels]
            for i in range(len(plan.buffers))
        ]

    def launches(self, pointers: Sequence[int]) -> list[cuda_driver.Launch]:
        """Its kernels with the pointers of all buffers."""
        found = []
        for kernel, (function, binary) in zip(self.plan.kernels, self._kernels, strict=True):
            own = [pointers[i] for i in kernel.arguments]
            own += [0] * (binary.pointers - len(own))  # scratch of Triton's, of no bytes
            found.append(cuda_driver.Launch(function, kernel.grid, 32 * binary.warps, own))
        return found


@functools.cache
def _program(name: str, spec: str, read: Shapes, written: Shapes, device: int) -> Program:
    return Program(plan_store.plan_of(name, spec, read, written), device)


def _load(kernel: Kernel, capability: int) -> tuple[cuda_driver.Function, Binary]:
    """The kernel on the GPU, and what it was compiled to."""
    binary = plan_store.code_of(kernel, capability)
    return cuda_driver.Function(binary.cubin, binary.name, binary.shared), binary


def shapes_of(tensors: Sequence[torch.Tensor]) -> Shapes:
    """Shapes and dtypes, as `plan_store` takes them."""
    return tuple((tuple(x.shape), str(x.dtype)[6:]) for x in tensors)


def _device(*tensors: Sequence[torch.Tensor]) -> torch.device:
    return next(x.device for some in tensors for x in some)


def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _constant(buffer: Buffer, device: int) -> torch.Tensor:
    data = torch.frombuffer(bytearray(buffer.bytes()), dtype=torch.uint8).to(f"cuda:{device}")
    return data.view(getattr(torch, buffer.dtype)).reshape(buffer.shape)


def _empty(buffer: Buffer, device: int) -> torch.Tensor:
    dtype = getattr(torch, buffer.dtype)
    return torch.empty(buffer.shape, dtype=dtype, device=f"cuda:{device}")


def _check(x: torch.Tensor, buffer: Buffer, device: int) -> None:
    if tuple(x.shape) != buffer.shape or str(x.dtype)[6:] != buffer.dtype:
        raise ValueError(
            f"{buffer.kind} tensor {buffer.index}: got {x.dtype}{list(x.shape)}, "
            f"expected {buffer.dtype}{list(buffer.shape)}"
        )
    if x.device.index != device or x.device.type != "cuda":
        raise ValueError(f"{buffer.kind} tensor {buffer.index}: got {x.device}, expected {device}")
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"{buffer.kind} tensor {buffer.index}: got strides {x.stride()} at "
            f"{x.data_ptr() % ALIGNMENT} bytes, expected a contiguous one aligned to {ALIGNMENT}"
        )
