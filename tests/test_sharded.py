"""Runs `tests/sharded` where there are eight devices: in a process of its own, of virtual ones.

Without what is slow there: every format, and the decoder, on each of twenty meshes. That is

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/sharded
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("sharded")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_on_eight_virtual_devices(file):
    flags = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
    ]
    done = subprocess.run(
        [*command, FOLDER / file],
        # threads of XLA: with one a core, on two cores, all can wait for each other in collectives
        env=os.environ | {"XLA_FLAGS": flags, "NPROC": "16"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
