"""What gets installed, and that our folder `kernels/` never stands in for Hugging Face's package of that name."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "packages"
    )
    on_disk = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("vtfast/**/__init__.py")
    }
    assert set(ast.literal_eval(call.value)) == on_disk | {"vtfast_kernels"}


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


IMPORTS = """
import vtfast_kernels.linear_grpo_loss, sys
assert not {"transformers", "deepspeed"} & set(sys.modules), "the kernels need torch and triton only"
from transformers import Qwen2VLForConditionalGeneration
"""


def test_the_root_folder_does_not_shadow_the_hubs_kernels(tmp_path):
    """From the repository root, without that package and with one that stands in for it."""
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    check = IMPORTS + "import kernels; assert kernels.theirs"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment, check=True)
