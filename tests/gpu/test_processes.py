"""Other processes compute what this one does, however they were started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import processes, require_gpu

require_gpu()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process(method, fused):
    process = subprocess.run(
        [sys.executable, "-m", "tests.gpu.processes", method, fused.name],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads(process.stdout) == processes.hashes(fused.name)
