"""The stored outputs on a processor without wide vector units, as torch, MKL and oneDNN
are told to behave like one.

``make matrix`` goes through all of them, and more (docs/reproducibility.md).
"""

import subprocess
import sys

import pytest
from matrix import IS_X86_64, ROOT, prepared, processor


@pytest.mark.skipif(not IS_X86_64, reason="this isn't an x86-64 processor")
def test_all_stored_outputs_come_out_under_sse():
    with prepared(processor("SSE", 1)) as (before, folder, variables):
        command = [
            *before,
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            ROOT / "notebooks",
        ]
        run = subprocess.run(
            command,
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
