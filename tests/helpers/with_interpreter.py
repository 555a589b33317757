"""Run by test_rollout_graphs.py in a process of its own: a rollout on the Triton kernels under Triton's interpreter."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from vtfast_kernels import add_rms_norm, checks, linear_sample, paged_attention, rope_append, silu_mul

from vtfast.data.processor import Processor
from vtfast.model.loading import load_model
from vtfast.rollout import RolloutEngine, Sampling


def main(path: str) -> None:
    policy, processor = load_model(path), Processor.from_pretrained(path)
    hasty = type(policy)(policy.module, tuple(range(0, policy.head.shape[0], 9)))
    prompts = [processor.encode(text, []) for text in ("User: how many chairs?", "Left, or right of it?")]
    sampling = Sampling(max_new_tokens=4)
    expected = RolloutEngine(hasty).generate(prompts, 2, sampling, seed=1)

    plain, calls = checks.choose_impl, []

    def triton_for_auto(impl, tensor, name="hidden", **kwargs):
        calls.append(name)
        return "triton" if impl in ("auto", "torch") else plain(impl, tensor, name, **kwargs)

    for module in (add_rms_norm, linear_sample, paged_attention, rope_append, silu_mul):
        module.choose_impl = triton_for_auto
    engine = RolloutEngine(hasty, graphs=True, capture=lambda step, rows: lambda: step(rows), steps_per_sync=2)
    found = engine.generate(prompts, 2, sampling, seed=1)
    assert {"x", "hidden", "query", "qkv", "gate_up"} <= set(calls), set(calls)
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-5, atol=1e-5)
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
