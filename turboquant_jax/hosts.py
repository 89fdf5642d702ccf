"""Several hosts: every one runs the same program, and they find each other by the environment.

JAX_COORDINATOR_ADDRESS is HOST:PORT of the first process, JAX_NUM_PROCESSES how many there are,
JAX_PROCESS_ID which one this is, from 0 on.
"""

import os
import socket
import time
from collections.abc import Mapping

import jax

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start(environment: Mapping[str, str] = os.environ, timeout: float = 300) -> bool:
    """`jax.distributed.initialize`, once all processes have come; False without an address.

    JAX ends the process where one is missing, so they are counted before, over the same port.

    Raises:
      ValueError: an environment that says something else.
      TimeoutError: processes that have not come within `timeout` seconds, by their numbers.
    """
    if not (address := environment.get(ADDRESS)):
        return False
    count, number = (_number(environment, name) for name in (COUNT, NUMBER))
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{ADDRESS}: got {address}, expected HOST:PORT")
    if not 0 <= number < count:
        raise ValueError(f"{NUMBER}: got {number}, expected 0 to {count - 1}: {COUNT} is {count}")
    deadline = time.monotonic() + timeout
    if number == 0:
        _gather(int(port), count, deadline)
    else:
        _join(host.strip("[]"), int(port), number, deadline)
    jax.distributed.initialize(address, count, number)
    return True


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name}: got {text!r}, expected a number beside {ADDRESS}")
    return int(text)


def _gather(port: int, count: int, deadline: float) -> None:
    """Wait for the others, then let all of them go."""
    here: dict[int, socket.socket] = {}
    try:
        with socket.create_server(("", port), backlog=count) as server:
            while len(here) < count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    other, _ = server.accept()
                    other.settimeout(max(deadline - time.monotonic(), 0.01))
                    here[int(other.recv(16))] = other
                except TimeoutError:
                    missing = sorted(set(range(1, count)) - here.keys())
                    raise TimeoutError(
                        f"port {port}: got {len(here) + 1} of {count} processes, expected "
                        f"{', '.join(map(str, missing))} too"
                    ) from None
        for other in here.values():
            other.sendall(b"go")
    finally:
        for other in here.values():
            other.close()


def _join(host: str, port: int, number: int, deadline: float) -> None:
    """Tell the first process, and wait until all have."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{host}:{port}: got no answer of process 0, expected it there")
        try:
            with socket.create_connection((host, port), timeout=left) as first:
                first.sendall(str(number).encode())
                if first.recv(2) == b"go":
                    return
        except OSError:
            pass
        time.sleep(0.1)
