"""Times from a trace that is written by hand."""

import pytest
from jax.profiler import ProfileData

from experiments.speed.device_time import DeviceTime, device_time, times_of_calls

LINE = 'lines {{ name: "{name}" timestamp_ns: {start} {events} }}'
EVENT = "events {{ metadata_id: 1 offset_ps: {} duration_ps: {} }}"
METADATA = 'event_metadata { key: 1 value { id: 1 name: "kernel" } }'


def line(name, start, *events):
    micro = 10**6
    text = " ".join(EVENT.format(offset * micro, last * micro) for offset, last in events)
    return LINE.format(name=name, start=start, events=text)


def test_calls_are_told_apart_and_only_device_streams_count():
    lines = [
        line("Stream #1(Compute)", 1000, (0, 10), (11, 5), (100_000, 10)),
        line("Stream #2(MemcpyD2D)", 1000, (14, 4)),
        line("Derived", 1000, (0, 190_000)),
    ]
    host = f'planes {{ name: "/host:CPU" {line("Stream", 1000, (0, 190_000))} {METADATA} }}'
    text = f'planes {{ name: "/device:GPU:0" {" ".join(lines)} {METADATA} }} {host}'
    data = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))
    first, second = times_of_calls(data)
    assert first == DeviceTime(pytest.approx(19e-6), pytest.approx(18e-6))
    assert second == DeviceTime(pytest.approx(10e-6), pytest.approx(10e-6))


def test_a_device_without_a_profiler_is_refused(monkeypatch):
    monkeypatch.setattr("experiments.speed.device_time.times_of_calls", lambda data: [])
    with pytest.raises(ValueError, match="0 calls in the trace, expected 2"):
        device_time(lambda: 0, repetitions=2)
