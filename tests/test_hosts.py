"""Processes find each other by the environment, and work on one mesh; a missing one is named."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from turboquant_jax import hosts

PROCESS = Path(__file__).with_name("sharded") / "process.py"


def environment(port, number, count=2):
    names = hosts.ADDRESS, hosts.COUNT, hosts.NUMBER
    return dict(zip(names, (f"localhost:{port}", str(count), str(number)), strict=True))


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_say_what_one_device_says(tmp_path, port):
    flags = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
    started = [
        subprocess.Popen(
            [sys.executable, PROCESS, tmp_path],
            env=os.environ | environment(port, number) | {"XLA_FLAGS": flags, "NPROC": "16"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    first, second = (text.splitlines()[-1].partition(": ") for text in said)
    assert (first[0], second[0]) == ("process 0", "process 1")
    assert first[2] == second[2]


def test_without_an_address_nothing_starts():
    assert not hosts.start({})


def test_a_missing_process_is_named(port):
    with pytest.raises(TimeoutError, match="got 1 of 3 processes, expected 1, 2 too"):
        hosts.start(environment(port, 0, 3), timeout=0.2)


def test_a_missing_first_process_is_named(port):
    with pytest.raises(TimeoutError, match=f"localhost:{port}: got no answer of process 0"):
        hosts.start(environment(port, 1), timeout=0.2)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (hosts.ADDRESS, "somewhere", "expected HOST:PORT"),
        (hosts.COUNT, "", "got '', expected a number"),
        (hosts.NUMBER, "2", "got 2, expected 0 to 1"),
    ],
)
def test_another_environment_is_refused(name, value, said):
    with pytest.raises(ValueError, match=f"{name}: .*{said}"):
        hosts.start(environment(1, 0) | {name: value})
