"""`python -m bench kernels --sparse`: linear_grpo_loss with `sparse_tau` against without, over how certain tokens are.

The hidden states are synthetic: each points at one to three rows of the head, with a strength that makes the token
nearly certain, or (a given share of them) uncertain. Real models' tokens may be less certain: what they keep is
unmeasured. FLOPs of the vocabulary matmuls are counted, not derived.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vtfast_kernels.cases import Shape
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss
from vtfast_kernels.linear_logprob import linear_logprob

from bench._harness import alternate, append, device_name, paired_ratio, quantiles, versions

SHAPE = Shape(N=512, V=32768, D=1536)
UNCERTAIN = (0.0, 0.1, 0.2, 0.4)
"""Shares of uncertain tokens."""
TAU = 2.0**-10


class CountMatmuls(TorchDispatchMode):
    """Counts the FLOPs of matmuls."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def inputs_of(shape: Shape, uncertain: float, device: str) -> tuple[dict, float]:
    """Return the arguments of the loss, with the log-probs of the policy that sampled, and the mean entropy in nats."""
    generator = torch.Generator().manual_seed(0)
    N, V, D = shape.N, shape.V, shape.D
    weight = torch.randn(V, D, generator=generator) / D**0.5
    frequency = 1 / torch.arange(1, V + 1).float() ** 1.1
    towards = torch.multinomial(frequency, 3 * N, replacement=True, generator=generator).view(N, 3)
    mixture = torch.softmax(2 * torch.randn(N, 3, generator=generator), 1)
    hidden = torch.nn.functional.normalize((weight[towards] * mixture[..., None]).sum(1))
    strength = torch.rand(N, generator=generator)
    is_uncertain = torch.rand(N, generator=generator) < uncertain
    hidden *= torch.where(is_uncertain, 12 + 6 * strength, 28 + 8 * strength)[:, None]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = {"hidden": hidden.to(device, dtype), "weight": weight.to(device, dtype)}
    inputs["target"] = towards[:, 0].to(device)
    logp, entropy = linear_logprob(**inputs, entropy=True)
    for leaf in ("hidden", "weight"):
        inputs[leaf].requires_grad_()
    inputs |= {
        "sequence_id": torch.arange(N, device=device) * 16 // N,
        "advantage": torch.randn(16, generator=generator).to(device),
        "spec": GRPOLoss(beta=0.0),
        "old_logp": logp,
    }
    return inputs, float(entropy.mean())


def step(inputs: dict, tau: float):
    """Return a function that runs forward and backward and returns the output."""

    def run():
        inputs["hidden"].grad = inputs["weight"].grad = None
        out = linear_grpo_loss(**inputs, sparse_tau=tau)
        out.loss.backward()
        return out

    return run


def compare(shape: Shape, uncertain: float, device: str, rounds: int) -> list[dict]:
    """Print a line, and return the rows of kernels.csv."""
    inputs, entropy = inputs_of(shape, uncertain, device)
    runs = {"dense": step(inputs, 0.0), "sparse": step(inputs, TAU)}
    flops, gradients, out = {}, {}, None
    for name, run in runs.items():
        with CountMatmuls() as count:
            out = run()
        flops[name], gradients[name] = count.flops, inputs["hidden"].grad.float()
    apart = float((gradients["sparse"] - gradients["dense"]).norm() / gradients["dense"].norm())
    times = alternate(runs, rounds, device)
    ratio, low, high = paired_ratio(times["sparse"], times["dense"])
    share = flops["sparse"] / flops["dense"]
    numbers = f"{float(out.dense_rows):>6.3f} {float(out.kept):>6.4f} {share:>6.3f}"
    ms = [1e3 * quantiles(times[name])[1] for name in runs]
    speed = f"{ms[0]:>9.0f} {ms[1]:>9.0f} {ratio:>6.2f} ({low:.2f}-{high:.2f})"
    print(f"  {uncertain:>9.0%} {entropy:>8.2f} {numbers} {speed} {apart:>9.1e} {float(out.dropped.max()):>8.1e}")
    row = {"op": "linear_grpo_loss", "shape": str(shape), "device": device_name(device)}
    row |= {"dtype": str(inputs["hidden"].dtype).removeprefix("torch."), "versions": versions("torch", "triton")}
    peer, values = f"sparse, {uncertain:.0%} uncertain", {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    p20, p50, p80 = (1e3 * value for value in quantiles(times["sparse"]))
    return [
        row | {"peer": peer, "metric": "ms", "p20": p20, "p50": p50, "p80": p80} | values,
        row | {"peer": peer, "metric": "flops_share", "p20": share, "p50": share, "p80": share},
    ]


def main(shape: Shape, device: str, rounds: int) -> None:
    print(f"\nlinear_grpo_loss, sparse_tau 2^-10 against 0, {shape}, {device}, {rounds} rounds, order alternated")
    print("synthetic hidden states; what real models keep is unmeasured")
    names = (
        "uncertain",
        "entropy",
        "dense",
        "kept",
        "FLOPs",
        "dense ms",
        "sparse ms",
        "time",
        "",
        "|error|",
        "dropped",
    )
    print("  {:>9} {:>8} {:>6} {:>6} {:>6} {:>9} {:>9} {:>6} {:<11} {:>9} {:>8}".format(*names))
    for uncertain in UNCERTAIN:
        append("kernels.csv", compare(shape, uncertain, device, rounds))
