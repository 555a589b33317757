"""Both worlds: torchvision installed (qwen_vl_utils resizes) and not (vtfast does), with the same pixels."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import outside_ranks

ASIDE = Path(sys.prefix) / "torchvision"
"""Where `make setup` keeps a torchvision that is not on the path: a CPU-only torch cannot load it unaided."""


def test_where_torchvision_is_installed():
    installed = importlib.util.find_spec("torchvision") is not None
    if not installed and not ASIDE.is_dir():
        pytest.skip(f"no torchvision, nor one set aside in {ASIDE} (make setup puts it there)")
    folder = Path(__file__).parents[1]
    environment = outside_ranks() | ({} if installed else {"PYTHONPATH": str(ASIDE)})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(folder / "helpers/with_torchvision.py")],
        env=environment,
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_transformers_loads_without_vtfast():
    """The environment that `make setup` makes must not break other people's imports."""
    subprocess.run([sys.executable, "-c", "from transformers import Qwen2VLForConditionalGeneration"], check=True)


@pytest.mark.parametrize(
    ("torch_version", "torchvision_version"),
    [
        ("cuda: Optional[str] = '13.0'", "__version__ = '0.28.0+cu130'"),
        ("cuda: Optional[str] = None", "__version__ = '0.28.0+cpu'"),
        ("cuda: Optional[str] = None", ""),  # not installed
    ],
)
def test_a_torchvision_that_loads_is_left_alone(monkeypatch, torch_version, torchvision_version):
    """Declaring its operators first would break one that brings them itself."""
    from vtfast.utils import torchvision_shim

    texts = {"torch": torch_version, "torchvision": torchvision_version}
    monkeypatch.setattr(torchvision_shim, "_version_file", texts.get)
    monkeypatch.setattr(torchvision_shim, "_kept", [])
    assert torchvision_shim.patch_torchvision() is False
