"""Makes `import torchvision` work with a CPU-only torch and torchvision's CUDA build.

Package indexes ship torchvision as a CUDA build only. Its compiled part does not load with a CPU-only torch; its Python
part then fails with "operator torchvision::nms does not exist", and so do `qwen_vl_utils` and parts of transformers.
Declaring the two missing operators, which vtfast never calls, is enough. This has to happen before transformers is
imported anywhere, so `vtfast/__init__.py` does it.
"""

import importlib.util
import re
from pathlib import Path

_kept: list[object] = []  # operators vanish with the Library object that defined them


def _version_file(package: str) -> str:
    """Text of a package's version.py, read without importing the package; "" if there is none."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "version.py"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""


def patch_torchvision() -> bool:
    """Declare torchvision's operators if, and only if, this torch cannot load them.

    Returns:
        True if operators were declared. Costs an import of torch in that case, two small reads
        otherwise.
    """
    torch_has_cuda = not re.search(r"^cuda\b.*=\s*None", _version_file("torch"), re.MULTILINE)
    if torch_has_cuda or "+cu" not in _version_file("torchvision") or _kept:
        return False
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return True
