"""Run by test_liger.py in a process of its own, under Triton's interpreter: Liger's kernels against Hugging Face's.

Prints the largest relative error of log-probs and gradients, and how many modules Liger ran in.
"""

import sys

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import layer_norm, rms_norm
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def convert(value):
    """Triton 3.7's interpreter hands a float argument to the kernel as Python's, on which Liger calls `.to`."""
    if isinstance(value, float):
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _convert(value)


interpreter._implicit_cvt = convert
layer_norm.rsqrt = rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # libdevice's is for GPUs alone


def main(folder: str) -> None:
    from PIL import Image
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    from vtfast.data import Processor
    from vtfast.data.prompt_templates import IMAGE
    from vtfast.model import liger
    from vtfast.model.loading import load_model
    from vtfast.scoring import completion_logprobs

    # The rotation is for CUDA tensors alone; here the CPU stands in for it.
    class OnCpu(liger.CudaRotation):
        def __init__(self, fast, plain):
            super().__init__(fast, fast)

    liger.CudaRotation = OnCpu

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    prompt = Processor.from_pretrained(folder).encode(IMAGE + "Is it left?", [image])

    def run(policy):
        logp = torch.cat(completion_logprobs(policy, [prompt], [[[5, 6, 7], [8]]])[0])
        logp.sum().backward()
        return [logp.detach(), *(p.grad for p in policy.module.parameters())]

    plain = run(load_model(folder))
    before = modeling_qwen2_vl.apply_rotary_pos_emb
    policy = load_model(folder)
    liger.use_liger(policy)
    assert modeling_qwen2_vl.apply_rotary_pos_emb is not before
    ours = run(policy)
    error = max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(ours, plain, strict=True))
    patched = sum("forward" in vars(module) for module in policy.module.modules())
    print(f"error {error:.3e} patched {patched}")


if __name__ == "__main__":
    main(sys.argv[1])
