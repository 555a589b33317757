"""The kernel tests run twice. In the main process `impl` is the CPU path (and Triton's own on a GPU); in a
child that `test_interpreter.py` starts with TRITON_INTERPRET=1, every test that takes `impl` runs again with
the Triton kernels on CPU tensors. Triton reads that variable when it is first imported, which another test
of this process may have done already: hence the child."""

import os
import re
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it on CUDA

import pytest
import torch
from vtfast_kernels import checks, chunks

INTERPRETED = checks.interpreted()

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter._convert_float

    def rounded(values, source, target, mode):
        """The interpreter cuts fp32 off where a GPU rounds to the nearest bf16 or fp16."""
        if source == tl.float32 and target in (tl.bfloat16, tl.float16):
            half = torch.bfloat16 if target == tl.bfloat16 else torch.float16
            wide = torch.from_numpy(np.frombuffer(values.tobytes(), dtype=np.float32).copy())
            return wide.to(half).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        return cast(values, source, target, mode)

    interpreter._convert_float = rounded


def pytest_generate_tests(metafunc):
    if "impl" in metafunc.fixturenames:
        impls = ["triton"] if INTERPRETED else ["torch"]
        gpu = pytest.param("triton", marks=pytest.mark.gpu)
        metafunc.parametrize("impl", impls + [gpu] * torch.cuda.is_available())


def pytest_collection_modifyitems(config, items):
    if INTERPRETED:
        items[:] = [item for item in items if "impl" in getattr(item, "fixturenames", ())]


def pytest_terminal_summary(terminalreporter):
    """Says what a run on a CPU has not executed in this process."""
    if INTERPRETED or torch.cuda.is_available():
        return
    files = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
    names = [name for file in files for name in re.findall(r"\ndef (\w+_kernel)\(", file.read_text("utf-8"))]
    child = any("test_interpreter" in report.nodeid for report in terminalreporter.getreports("passed"))
    how = "ran in the interpreter alone" if child else "did not run (test_interpreter.py runs them)"
    terminalreporter.write_line(f"Triton kernels that {how}: {', '.join(names)}")


@pytest.fixture
def device(impl) -> str:
    return "cuda" if impl == "triton" and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Every `torch.empty` of the code under test holds NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    # `make_deterministic`, which another test may have called, leaves it out.
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 tokens at most, so that small inputs cross chunk borders."""
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "CUDA_CHUNK_BYTES", 1)
