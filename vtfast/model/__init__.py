"""The trained model: Hugging Face's modules over packed rows, the reference model, LoRA and the shipped tiny model.
Start with `policy.py`; `loading.py` makes a policy from a folder."""

from vtfast.model.loading import load_model
from vtfast.model.policy import Policy
from vtfast.model.tiny_model import build_tiny_model

__all__ = ["Policy", "build_tiny_model", "load_model"]
