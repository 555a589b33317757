"""Liger's kernels inside our model, run by Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_liger_computes_what_hugging_face_does(random_path):
    child = Path(__file__).parents[1] / "helpers/with_liger.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(child), str(random_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    error, patched = re.search(r"error (\S+) patched (\d+)", done.stdout).groups()
    assert float(error) < 1e-4
    # 3 layers with 2 norms and an MLP each, the last norm; 2 vision blocks with 2 norms, the merger's norm.
    assert int(patched) == 3 * 3 + 1 + 2 * 2 + 1


def test_without_liger_hugging_faces_layers_stay(random_path, monkeypatch, caplog):
    from vtfast.model.liger import use_liger
    from vtfast.model.loading import load_model

    policy = load_model(random_path)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    with caplog.at_level("WARNING", logger="vtfast"):
        use_liger(policy)
    (record,) = caplog.records
    assert record.getMessage().startswith("liger-kernel cannot be imported (ModuleNotFoundError: ")
    assert not any("forward" in vars(module) for module in policy.language_model.modules())


def test_cpu_tensors_are_rotated_as_before():
    import torch

    from vtfast.model.liger import CudaRotation

    def never(*_):
        raise AssertionError("called for CPU tensors")

    rotate = CudaRotation(never, lambda q, k, cos, sin, unsqueeze_dim: (q, k))
    q = torch.zeros(1, 2, 3, 4)
    assert rotate(q, q, q, q)[0] is q
