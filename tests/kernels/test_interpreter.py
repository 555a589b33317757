"""Every Triton kernel on the CPU: the tests that take `impl`, once more in a child under the interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_under_interpreter(*options: str, interpreted: bool = True) -> str:
    env = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "pytest", str(HERE), "-p", "no:cacheprovider", "-x", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_under_the_interpreter():
    """Each test that takes `impl` has run there: none has vanished on the way."""
    selection = ("-m", "not slow and not gpu")
    passed = set(re.findall(r"PASSED .*?(\w+\.py::\w+)\[triton", pytest_under_interpreter("-rp", *selection)))
    plain = pytest_under_interpreter("--collect-only", *selection, interpreted=False)
    missing = set(re.findall(r"(\w+\.py::\w+)\[torch", plain)) - passed
    assert len(passed) > 50 and not missing


@pytest.mark.slow
def test_large_shapes_under_the_interpreter():
    pytest_under_interpreter("-m", "slow and not gpu")


def test_an_op_imports_torch_and_triton_only():
    code = """
import sys
import vtfast_kernels.linear_grpo_loss, vtfast_kernels.linear_sample, vtfast_kernels.cases
heavy = {"transformers", "trl", "liger_kernel", "deepspeed", "vtfast"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
