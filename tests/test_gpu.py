"""What only a GPU can show: the flash kernels behind packed rows, bf16 against fp32, a short run on CUDA."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hugging_face import logprobs
from test_attention import KEYS, LENGTHS, D, plain, rows
from test_scoring import COMPLETIONS, flat

from vtfast.attention import BACKENDS, Layout, _usable, attend
from vtfast.liger import use_liger
from vtfast.model import load_model
from vtfast.scoring import completion_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 3])
def test_attention_backends(backend, window):
    """bf16, forward and backward, against float64 on the CPU from the same rounded inputs."""
    if not _usable(backend, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"{backend} is not installed here")
    exact = [x.detach().bfloat16().double().requires_grad_() for x in rows(sum(LENGTHS))]
    ours = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    expected = plain(*exact, LENGTHS, KEYS, window=window)
    out = attend(*ours, Layout(LENGTHS, KEYS, backend=backend, device="cuda"), D**-0.5, window)
    weight = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    weight = weight.bfloat16()
    grads = torch.autograd.grad(out, ours, weight.cuda())
    expected_grads = torch.autograd.grad(expected, exact, weight.double())
    for mine, wanted in zip([out, *grads], [expected, *expected_grads], strict=True):
        torch.testing.assert_close(mine.cpu().double(), wanted, rtol=2e-2, atol=2e-2)


def gradients(policy, total):
    policy.module.zero_grad()
    total.backward()
    return {
        n: p.grad.double().cpu() for n, p in policy.module.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("liger", [False, True])
def test_bf16_is_no_worse_than_hugging_faces(random_path, prompts, liger):
    """Distance of log-probs and gradients from fp32 on the CPU: packed on the GPU against padded-free HF in bf16."""
    gold = load_model(random_path)
    ours = load_model(random_path, "bfloat16", "cuda")
    if liger:
        use_liger(ours)
    theirs = load_model(random_path, "bfloat16", "cpu")

    def unpacked(policy):
        return torch.cat(
            [
                logprobs(policy, prompt, tokens)
                for prompt, group in zip(prompts, COMPLETIONS, strict=True)
                for tokens in group
            ]
        )

    scores = {
        "gold": (gold, unpacked(gold)),
        "ours": (ours, flat(completion_logprobs(ours, prompts, COMPLETIONS))),
        "theirs": (theirs, unpacked(theirs)),
    }
    error = {
        n: (s.detach().double().cpu() - scores["gold"][1].detach()).norm()
        for n, (_, s) in scores.items()
    }
    assert error["ours"] <= 1.5 * error["theirs"] + 1e-3
    grads = {name: gradients(policy, logp.sum()) for name, (policy, logp) in scores.items()}
    for name, wanted in grads["gold"].items():
        mine, other = ((grads[who][name] - wanted).norm() for who in ("ours", "theirs"))
        assert mine <= 2 * other + 1e-2 * wanted.norm(), name


@pytest.mark.parametrize(
    "flags", [[], ["--beta", "0.04", "--gradient_checkpointing", "true", "--token_budget", "300"]]
)
def test_a_short_run(tmp_path, flags):
    root = Path(__file__).parent.parent
    command = [
        sys.executable, str(root / "train.py"), "--max_steps", "3", "--eval_samples", "16", "--device", "cuda",
        "--max_completion_length", "16", "--output_dir", str(tmp_path / "run"), *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["grad_norm"] > 0 for line in lines)
    assert all(line["sampler_drift"] < 0.1 for line in lines)
