"""vtfast: GRPO for vision-language models with fused kernels."""

from vtfast.data.torchvision_shim import mend_torchvision

mend_torchvision()  # before anything can import transformers
