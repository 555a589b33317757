"""vtfast: GRPO for vision-language models with fused kernels."""

from vtfast.utils.torchvision_shim import mend_torchvision

mend_torchvision()  # before anything can import transformers
