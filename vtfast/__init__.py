"""vtfast: GRPO for vision-language models with fused kernels."""

from vtfast.utils.torchvision_shim import patch_torchvision

patch_torchvision()  # before anything can import transformers
