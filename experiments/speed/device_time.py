"""What a call takes on the device itself, by the profiler.

`busy` is the sum of the durations of all kernels and copies of a call, `span` the time from the
first one's start to the last one's end, gaps between them included. A chain of kernels that are
shorter than their launches from the host shows gaps that a longer queue would not have; `busy` does
not.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

# Seconds of rest between two calls; a gap of half of it separates them in the trace. A host that
# is interrupted while it launches kernels leaves gaps of a few milliseconds.
REST = 5e-2


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """Seconds."""

    busy: float
    span: float


def device_time(run: Callable[[], object], repetitions: int = 7) -> DeviceTime:
    """Medians over repetitions of a call, after two calls that do not count.

    Raises:
      ValueError: the trace does not hold as many calls, as on a device without a profiler.
    """
    for _ in range(2):
        jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(repetitions):
                time.sleep(REST)
                jax.block_until_ready(run())
        (trace,) = Path(folder).rglob("*.xplane.pb")
        times = times_of_calls(ProfileData.from_file(str(trace)))
    if len(times) != repetitions:
        raise ValueError(f"got {len(times)} calls in the trace, expected {repetitions}")
    return DeviceTime(*(statistics.median(getattr(t, name) for t in times) for name in _NAMES))


def copy_bandwidth(nbytes: int = 2**30) -> float:
    """Bytes read and written per second by x + 1 on the default device."""
    x = jnp.zeros((nbytes // 4,), jnp.int32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def once() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * nbytes / device_time(once).busy


def times_of_calls(data: ProfileData) -> list[DeviceTime]:
    """The calls in a trace, which rest between them."""
    events = sorted(
        (event.start_ns, event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    calls: list[list[tuple[float, float]]] = []
    end = float("-inf")
    for start, duration in events:
        if start - end > REST / 2 * 1e9:
            calls.append([])
        calls[-1].append((start, duration))
        end = max(end, start + duration)
    return [
        DeviceTime(
            busy=sum(duration for _, duration in call) / 1e9,
            span=(max(sum(event) for event in call) - call[0][0]) / 1e9,
        )
        for call in calls
    ]


_NAMES = [field.name for field in dataclasses.fields(DeviceTime)]
