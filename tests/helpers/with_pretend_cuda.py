"""Run by test_pretend_cuda.py in a process of its own: the same with Triton's kernels, interpreted.

What "auto" picks on CUDA is what runs: kernels in fp32 and bf16 (with tensor descriptors, as on Hopper), PyTorch's
varlen attention, and decode steps that are captured and replayed.
"""

import os
import sys
from itertools import chain

os.environ["TRITON_INTERPRET"] = "1"

import torch
from pretend_cuda import pretend_cuda
from vtfast_kernels import paged_attention
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss
from vtfast_kernels.loss_types import LOSS_TYPES, TOKEN_LEVEL

from vtfast.data.processor import Processor
from vtfast.data.prompt_templates import IMAGE
from vtfast.model.loading import load_model
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.scoring import completion_logprobs

PLACES = ("cpu", "cuda")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def picture():
    from PIL import Image

    pixels = torch.arange(56 * 84 * 3, dtype=torch.int64).mul(7919).remainder(256)
    return Image.fromarray(pixels.view(56, 84, 3).to(torch.uint8).numpy())


def scores(policy, prompts):
    found = completion_logprobs(policy, prompts, [[[5, 6, 7], [9]], [[8]]])
    logp = torch.cat([logp for group in found for logp in group])
    logp.square().sum().backward()
    grads = [p.grad.float().cpu().flatten() for p in policy.module.parameters()]
    return [logp.detach().cpu(), *grads]


def losses(device, spec, dtype):
    """Loss, log-probs and gradients of 7 tokens, one of them ignored."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 32, generator=draw), 0.3 * torch.randn(50, 32, generator=draw)
    target = torch.tensor([3, 9, -100, 0, 49, 7, 7])
    logps = [-4 + 0.1 * torch.randn(7, generator=draw) for _ in range(3)]
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    old, ref, sampler = (x.to(device) for x in logps)
    out = linear_grpo_loss(
        hidden,
        weight,
        target.to(device),
        torch.tensor([0, 0, 0, 1, 1, 2, 2]).to(device),
        torch.tensor([1.0, -0.5, 0.25]).to(device),
        spec=spec,
        old_logp=old,
        ref_logp=ref,
        sampler_logp=sampler,
        num_sequences=5,
        num_tokens=20,
    )
    out.loss.backward()
    found = (out.loss.detach(), out.logp, out.entropy, out.clip_low, hidden.grad, weight.grad)
    return [x.float().cpu() for x in found]


def rollouts(path, device, dtype, prompts, **options):
    policy = load_model(path, dtype, device)
    hasty = type(policy)(policy.module, tuple(range(0, policy.head.shape[0], 9)), policy.attention_backend)
    engine = RolloutEngine(hasty, steps_per_sync=2, **options)
    sampling = Sampling(max_new_tokens=3)
    found = [chain(*engine.generate(prompts, 2, sampling, seed)) for seed in (1, 2)]
    return list(chain(*found)), engine


def assert_near(ours, theirs, dtype):
    for mine, other in zip(ours, theirs, strict=True):
        bound = TOLERANCE[dtype] * float(other.abs().max().clamp(min=1e-2))
        assert (mine - other).abs().max() <= bound, (dtype, mine, other)


def main(path: str) -> None:
    paged_attention.PROGRAMS = 1  # the interpreter runs them one after the other
    processor = Processor.from_pretrained(path)
    prompts = [processor.encode(IMAGE + "Is it left?", [picture()]), processor.encode("User: how many chairs?", [])]
    for dtype in TOLERANCE:
        expected = scores(load_model(path, dtype), prompts)
        with pretend_cuda():
            policy = load_model(path, dtype, "cuda")
            assert policy.attention_backend == ("sdpa" if dtype == "float32" else "varlen")
            assert_near(scores(policy, prompts), expected, dtype)
        for kind in LOSS_TYPES if dtype == "float32" else LOSS_TYPES[:1]:
            for level in ("token", "sequence")[: 1 if kind in TOKEN_LEVEL else 2]:
                spec = GRPOLoss(kind, importance_level=level, max_completion_length=10)
                expected = losses("cpu", spec, getattr(torch, dtype))
                with pretend_cuda():
                    assert_near(losses("cuda", spec, getattr(torch, dtype)), expected, dtype)
    for dtype, attention in (("float32", "auto"), ("bfloat16", "varlen")):
        expected, _ = rollouts(path, "cpu", dtype, prompts)
        with pretend_cuda():
            found, engine = rollouts(path, "cuda", dtype, prompts, attention=attention)
        assert engine.workspace.graphs.replays, "steps are captured where there is a graph"
        for ours, theirs in zip(found, expected, strict=True):
            assert dtype == "bfloat16" or ours.tokens == theirs.tokens  # which rounds the CPU's otherwise
            same = ours.tokens == theirs.tokens
            pairs = zip(ours.logprobs, theirs.logprobs, strict=same)
            assert not same or all(abs(a - b) <= TOLERANCE[dtype] for a, b in pairs)
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
