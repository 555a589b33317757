"""The model that is trained: Hugging Face's modules over packed rows. Start with `policy.py`."""

from vtfast.model.loading import load_model
from vtfast.model.policy import Policy
from vtfast.model.tiny_model import build_tiny_model

__all__ = ["Policy", "build_tiny_model", "load_model"]
