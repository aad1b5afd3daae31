"""Each host's adapters work where the other hosts are not installed."""

import subprocess
import sys

import host_alone
import pytest


@pytest.mark.parametrize("host", host_alone.FAMILIES)
def test_a_host_alone_is_enough(host):
    """The adapters are used in a process that can import no other host; theirs say what to install."""
    done = subprocess.run([sys.executable, host_alone.__file__, host], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{host}: works alone\n"
