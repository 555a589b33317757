"""The kernels in other trainers. Each file runs in its own process: a Hugging Face trainer wraps its model for any
process group that another test has left, and then waits for it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import outside_ranks


@pytest.mark.parametrize(("file", "tests"), [("helpers/with_examples.py", 2), ("helpers/with_trl.py", 17)])
def test_in_a_process_of_its_own(file, tests):
    path = Path(__file__).parents[1] / file
    command = [sys.executable, "-m", "pytest", str(path), "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(command, env=outside_ranks(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == tests, done.stdout
