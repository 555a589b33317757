"""The paths around the kernels on a pretended CUDA device: the CPU's results, no tensor of the host among its own."""

import contextlib
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import vtfast_kernels
from hugging_face import COMPLETIONS, flat
from make_trainer import asked, make
from pretend_cuda import DEVICE, OnDevice, pretend_cuda
from torch import nn
from vtfast_kernels import checks

from vtfast import trainer
from vtfast.distributed import init
from vtfast.distributed.ranks import Ranks
from vtfast.model.loading import load_model
from vtfast.model.reference_model import ReferenceModel
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.scoring import completion_logprobs
from vtfast.training import setup
from vtfast.training.groups import Rewards

OPS = (
    "add_rms_norm",
    "group_advantage",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "linear_sample",
    "paged_attention",
    "rope_append",
    "silu_mul",
)


@pytest.fixture
def device(monkeypatch):
    """With PyTorch's version of every op; the kernels are interpreted in `with_pretend_cuda.py`."""

    def choose(impl, *args, **kwargs):
        return "torch" if impl == "auto" else checks.choose_impl(impl, *args, **kwargs)

    for name in OPS:
        module = __import__(f"{vtfast_kernels.__name__}.{name}", fromlist=[name])
        monkeypatch.setattr(module, "choose_impl", choose)
    with pretend_cuda() as log:
        yield log
        assert not [x for x in log.waits if "index on the host" in x], "CUDA takes it, and waits for a copy"


def test_the_rules_of_cuda(device):
    here, there = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
    assert here.device == DEVICE and here.is_cuda and (here + torch.tensor(2.0)).is_cuda
    mixed = {
        "add": lambda: here + there,
        "add_": lambda: there.add_(here),
        "cat": lambda: torch.cat([here, there]),
        "matmul": lambda: here @ there.T,
        "where": lambda: torch.where(here > 0, here, there),
        "index": lambda: there[torch.zeros(1, dtype=torch.int64, device="cuda")],
        "numpy": here.numpy,
    }
    for name, operation in mixed.items():
        with pytest.raises(RuntimeError, match=r"on the CPU|numpy"):
            operation()
            pytest.fail(name)
    assert not device.waits
    here[0], view = 5.0, here.view(-1)
    view[-1] = 7.0
    assert here.cpu().sum() == 5 * 4 + 4 + 3 + 7 and here.cpu().is_cpu
    here[torch.tensor([0, 1])], here.tolist(), here[here > 5], float(here.sum())
    assert len(device.waits) == 6, "what the host waits for is counted"
    assert device.waits.pop(2) == "aten.index.Tensor by an index on the host"


def test_gradients_and_ties(device):
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    module[1].weight = module[0].weight
    ids = torch.tensor([1, 2, 2])
    module(ids).square().sum().backward()
    expected, module[0].weight.grad = module[0].weight.grad, None
    module.cuda()
    weight = module[1].weight
    assert weight is module[0].weight and isinstance(weight, OnDevice) and isinstance(weight, nn.Parameter)
    module(ids.cuda()).square().sum().backward()
    torch.testing.assert_close(weight.grad.cpu(), expected)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scored(policy, prompts):
    logp = flat(completion_logprobs(policy, prompts, COMPLETIONS))
    logp.square().sum().backward()
    grads = {name: p.grad.cpu() for name, p in policy.module.named_parameters() if p.grad is not None}
    return logp.detach().cpu(), grads


def test_log_probs_and_gradients(random_path, prompts, device):
    cpu, cuda = (scored(load_model(random_path, device=name), prompts) for name in ("cpu", "cuda"))
    torch.testing.assert_close(cuda[0], cpu[0], rtol=1e-5, atol=1e-5)
    assert cuda[1].keys() == cpu[1].keys()
    for name, grad in cpu[1].items():
        assert (cuda[1][name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-6, name


@pytest.mark.parametrize(
    "warp",
    [{}, {"greedy": True}, {"top_k": 9, "top_p": 0.8, "min_p": 0.01, "min_new_tokens": 2, "repetition_penalty": 1.2}],
    ids=["plain", "greedy", "warped"],
)
def test_rollouts(random_path, prompts, device, deterministic, warp):
    """With images, in two waves, rows leaving all the time."""
    sampling, found = Sampling(max_new_tokens=8, **warp), []
    for name in ("cpu", "cuda"):
        policy = load_model(random_path, device=name)
        hasty = type(policy)(policy.module, tuple(range(0, policy.head.shape[0], 9)))
        engine = RolloutEngine(hasty, attention="torch", max_rows=6)
        found.append(list(chain(*engine.generate(prompts, 3, sampling, seed=1))))
    for ours, theirs in zip(*found, strict=True):
        assert ours.tokens == theirs.tokens and ours.finish_reason == theirs.finish_reason
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_an_offloaded_reference_comes_and_goes(random_path, device):
    policy = load_model(random_path, device="cuda", freeze=["vision"])
    started = [p.cpu() for p in policy.module.parameters() if p.requires_grad]
    reference = ReferenceModel(policy, offload=True)
    for parameter in policy.module.parameters():
        parameter.data.zero_()
    shared = {id(p) for p in policy.module.parameters()}
    for _ in range(2):
        own = [p for p in reference.copy.module.parameters() if id(p) not in shared]
        assert len(own) == len(started) and not any(p.is_cuda for p in own)
        places = [p.data.data_ptr() for p in own]
        with reference.policy() as model:
            assert model is reference.copy and all(p.is_cuda for p in model.module.parameters())
            for parameter, value in zip(own, started, strict=True):
                assert parameter.cpu().equal(value)
        assert [p.data.data_ptr() for p in own] == places, "what was fetched is let go of, not fetched back"


class PlainEngine:
    """As much of DeepSpeed's engine as a step asks for; its optimizer, too."""

    def __init__(self, config, objective):
        self.module, self.optimizer = objective, self
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        # A large epsilon: the step is the gradient itself, not its sign.
        self.adam = torch.optim.AdamW(self.trained, config.learning_rate, eps=1.0, fused=True)

    def __call__(self, *inputs):
        return self.module(*inputs)

    def train(self):
        self.module.train()
        self.adam.zero_grad()

    def eval(self):
        self.module.eval()

    def get_lr(self):
        return [group["lr"] for group in self.adam.param_groups]

    def set_gradient_accumulation_boundary(self, is_last):
        pass

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def scaled_global_norm(self):
        return nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    get_global_grad_norm = scaled_global_norm

    @property
    def state(self):
        return self.adam.state

    def step(self):
        self.adam.step()


def by_place(groups, scorer, *_, **__):
    """Rewards that differ, whatever the completions."""
    values = [[float(place % 3) for place in range(len(group.tokens))] for group in groups]
    return [Rewards(torch.tensor([row] * len(scorer.names)), [{}] * len(row)) for row in values]


def stepped(folder, where, monkeypatch, **settings):
    """-> metrics of two steps, the weights behind them, and what came of scores and random numbers."""
    place = DEVICE if where == "cuda" else torch.device("cpu")
    monkeypatch.setattr(init, "init_distributed", lambda config: Ranks(0, 1, place))
    monkeypatch.setattr(setup, "zero2_engine", PlainEngine)
    monkeypatch.setattr(trainer, "score_completions", by_place)
    small = {"per_device_train_batch_size": 2, "max_completion_length": 6, "dtype": "float32"}
    small |= {"use_liger_kernel": False, "rollout_attention": "torch", "learning_rate": 0.1}
    made = make(folder, **small | settings)
    with contextlib.closing(made.scorer):
        metrics = [made.step(step, next(asked(made, [step]))).metrics for step in (1, 2)]
    return metrics, {name: p.detach().cpu() for name, p in made.session.policy.module.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.04, "offload_reference": True, "token_budget": 120},
        {"beta": 0.04, "use_peft": True},
        {"beta": 0.0, "freeze": "vision", "gradient_checkpointing": True, "loss_type": "dapo"},
    ],
    ids=["reference", "lora", "frozen"],
)
def test_whole_steps(tmp_path, device, monkeypatch, settings):
    """Rollout, advantages, reference, packed passes, loss, health and metrics; DeepSpeed's engine stood in for."""
    cpu, cuda = (stepped(tmp_path / x, x, monkeypatch, **settings) for x in ("cpu", "cuda"))
    for ours, theirs in zip(cuda[0], cpu[0], strict=True):
        assert theirs["grad_norm"] > 0
        for name in ("reward", "loss", "grad_norm", "entropy", "kl", "sampler_drift", "passes", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for name, value in cpu[1].items():
        torch.testing.assert_close(cuda[1][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_kernels_and_captured_steps(random_path):
    """Everything once more with Triton's kernels, interpreted, and graphs that are recorded and replayed."""
    script = Path(__file__).parents[1] / "helpers/with_pretend_cuda.py"
    done = subprocess.run([sys.executable, str(script), str(random_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]
