"""The scaling model: its parts against what is known exactly, and its ends against the measurement."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launchers import deepspeed_launcher, outside_ranks

from bench import roofline, scale
from bench._cluster import HOP, NETWORK_HOP, Cluster, all_gather_bytes, all_reduce_bytes
from bench._recorded_run import read_recorded
from bench._scaling import Choices, Measured, Model, Prediction, Slowest, Work, first_above, reduce_dominates
from bench._scaling_inputs import draw, estimate, from_rows, from_run, parse_shape, sizes_of
from bench._workload import MID, TWO_B, Workload, model_config
from vtfast.config import load_config
from vtfast.cost.devices import data_sheet
from vtfast.cost.micro_batches import GroupSize
from vtfast.cost.roofline import ModelSize
from vtfast.model.meta_model import meta_policy
from vtfast.trainer import Trainer
from vtfast.utils.errors import UserError

RATES = data_sheet("H100", torch.bfloat16)
FABRIC = Cluster(link=450e9, network=50e9)
GPUS = (1, 2, 4, 8, 16, 64, 256)


@pytest.fixture(scope="module")
def weights():
    return ModelSize.of(meta_policy(model_config("Qwen2-VL-2B"), torch.bfloat16))


def model_of(weights, groups, measured=None, cluster=FABRIC, budget=10_000, **choices):
    measured = measured or Measured(4, rollout=2.0, score=0.5, update=3.0, rest=0.1, host=0.2)
    return Model(Work(weights, groups, budget), measured, RATES, cluster, Choices(**choices), draws=128)


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(0)
    return [GroupSize(600, draw("uniform:100:700", 8, rng), [2048]) for _ in range(64)]


# Collectives


def test_volumes():
    """Of 8 GB on 4 ranks a ring's all-reduce sends 6 chunks of 2 GB, a gather 3."""
    assert all_reduce_bytes(4, 8e9) == 12e9 and all_gather_bytes(4, 8e9) == 6e9
    assert all_reduce_bytes(1, 8e9) == all_gather_bytes(1, 8e9) == 0


def test_seconds_of_collectives():
    assert FABRIC.all_reduce(4, 8e9) == pytest.approx(12e9 / 450e9 + 6 * HOP)
    assert FABRIC.all_gather(8, 8e9) == pytest.approx(7e9 / 450e9 + 7 * HOP)
    # 16 GPUs on two machines: 8 ports of 50 GB/s; two hops of a ring's 16 leave a machine
    assert FABRIC.bandwidth(16) == 400e9
    assert FABRIC.hop(16) == pytest.approx((14 * HOP + 2 * NETWORK_HOP) / 16)
    ring, tree = 30 * FABRIC.hop(16), 14 * HOP + 2 * NETWORK_HOP
    assert FABRIC.all_reduce(16, 8e9) == pytest.approx(15e9 / 400e9 + min(ring, tree))
    # of 1,024 GPUs the tree is sooner: 14 hops inside a machine, 14 between 128 machines
    latency = 14 * HOP + 14 * NETWORK_HOP
    assert FABRIC.all_reduce(1024, 8e9) == pytest.approx(all_reduce_bytes(1024, 8e9) / 400e9 + latency)
    assert Cluster(450e9, 12.5e9, node=4).bandwidth(8) == 50e9
    assert FABRIC.all_reduce(1, 8e9) == FABRIC.all_gather(1, 8e9) == FABRIC.all_reduce(8, 0) == 0


# Stragglers


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_slowest_of_exponential_and_uniform_times(ranks):
    """The largest of n: 1 + 1/2 + ... + 1/n means of an exponential, n / (n + 1) of a uniform on [0, 1]."""
    even = (np.arange(100_000) + 0.5) / 100_000
    assert Slowest.of([(even, ranks)]).mean == pytest.approx(ranks / (ranks + 1), rel=1e-3)
    found = Slowest.of([(-np.log(even), ranks)])
    assert found.mean == pytest.approx(sum(1 / k for k in range(1, ranks + 1)), rel=5e-3)
    assert found.quantile(0.5) == pytest.approx(-math.log(1 - 0.5 ** (1 / ranks)), rel=5e-3)


def test_slowest_of_two_kinds_of_rank():
    """All outcomes of two dice, one numbered 2, 4, 6, 8, 10, 12, and of one die alone."""
    die, double = np.arange(1.0, 7), np.arange(2.0, 13, 2)
    found = Slowest.of([(die, 1), (double, 1)])
    assert found.mean == pytest.approx(np.mean([max(a, b) for a in die for b in double]))
    assert found.quantile(0.5) == np.quantile([max(a, b) for a in die for b in double], 0.5, method="inverted_cdf")
    assert Slowest.of([(die, 1)]).mean == pytest.approx(3.5)
    simulated = np.random.default_rng(0).choice(die, (50_000, 5)).max(axis=1)
    assert Slowest.of([(die, 5)]).mean == pytest.approx(simulated.mean(), rel=5e-3)


def test_equal_completions_are_not_waited_for(weights):
    model = model_of(weights, [GroupSize(600, [100] * 8, [])])
    for n in GPUS:
        found = model.predict(n, 4 * n)
        assert found.waiting == pytest.approx(0, abs=1e-9) and found.spread == pytest.approx((0, 0, 0))


def test_a_rank_without_prompts_waits(weights):
    model = model_of(weights, [GroupSize(600, [100] * 8, [])])
    few, enough = model.predict(8, 4), model.predict(4, 4)
    assert few.rollout == pytest.approx(enough.rollout / 2)
    assert few.waiting == pytest.approx(few.rollout - model.measured.host / 8 + few.update + few.score)
    assert enough.waiting == pytest.approx(0, abs=1e-9)


# The whole step


def test_one_gpu_is_the_measurement(weights, groups):
    model = model_of(weights, groups)
    one = model.predict(1, 4)
    assert one.step == pytest.approx(2.0 + 0.5 + 3.0 + 0.1, rel=1e-12)
    assert one.rollout == pytest.approx(2.0) and one.score == pytest.approx(0.5)
    assert one.update + one.optimizer == pytest.approx(3.0)
    assert one.waiting == pytest.approx(0, abs=1e-12) and one.reduce == one.gather == 0
    assert one.optimizer == pytest.approx(weights.trained * 30 / 3.35e12)


def test_parts_of_a_step_by_hand(weights):
    """Equal groups, one a pass: 16 GPUs on two machines with 4 prompts each."""
    model = model_of(weights, [GroupSize(600, [100] * 8, [])], budget=1400, overlap=0.0)
    found = model.predict(16, 64)
    gradients = weights.trained * 2
    assert found.passes == 4
    buckets = [2e8] * 22 + [gradients - 44e8]  # 100 million bf16 gradients each
    assert found.reduce == pytest.approx(4 * sum(FABRIC.all_reduce(16, size) for size in buckets))
    assert found.gather == FABRIC.all_gather(16, gradients)
    assert found.optimizer == pytest.approx(model.optimizer(1) / 16)
    assert found.update == pytest.approx(3.0 - model.optimizer(1)) and found.rollout == pytest.approx(2.0)
    assert found.tokens_per_second == pytest.approx(64 * 800 / found.step)
    hidden = model.but(choices=Choices(overlap=1.0)).predict(16, 64)
    assert hidden.reduce == pytest.approx(4 * FABRIC.all_reduce(16, buckets[-1])), "the last bucket is seen"
    partly = model.but(choices=Choices(overlap=0.03)).predict(16, 64)
    assert found.reduce - partly.reduce == pytest.approx(0.03 * found.update * 2 / 3)
    once = model.but(choices=Choices(overlap=0.0, every_pass=False)).predict(16, 64)
    assert once.reduce == pytest.approx(found.reduce / 4)
    scatter = model.but(choices=Choices(0.0, "reduce-scatter")).predict(16, 64)
    assert scatter.reduce == pytest.approx(4 * sum(FABRIC.all_gather(16, size) for size in buckets))


def test_weak_scaling_loses_and_strong_scaling_saturates(weights, groups):
    model = model_of(weights, groups)
    weak = [model.predict(n, 4 * n) for n in GPUS]
    steps = [p.step for p in weak]
    assert steps[0] == min(steps) and steps[-1] > 1.01 * steps[0]
    waits = [model.rollouts(n, 4 * n)[1].mean for n in GPUS]
    assert waits == sorted(set(waits))
    rates = [p.tokens_per_second for p in weak]
    assert rates == sorted(rates)
    strong = [model.predict(n, 64) for n in GPUS]
    until_idle = [p.step for p in strong if p.gpus <= 64]
    assert until_idle == sorted(until_idle, reverse=True)
    efficiency = scale.efficiencies(strong, strong[0])
    assert efficiency[0] == 1 and efficiency == sorted(efficiency, reverse=True)
    for found in (*weak, *strong):
        assert found.spread[0] <= found.spread[1] <= found.spread[2]


def test_slow_links_stop_zero_2_from_paying(weights, groups):
    slow = model_of(weights, groups, cluster=Cluster(4.5e9, 0.5e9), budget=5500)
    steps = [slow.predict(n, 4 * n) for n in GPUS]
    quarter = first_above(steps)
    assert quarter.gpus == 2 and reduce_dominates(steps).gpus == 2
    assert first_above([p for p in steps if p.gpus == 1]) is None
    fewer = slow.but(Work(weights, groups, 22_000)).predict(8, 32)
    assert fewer.passes < slow.predict(8, 32).passes and fewer.step < slow.predict(8, 32).step
    assert fewer.update == pytest.approx(slow.predict(8, 32).update, rel=0.01)


# Where it starts


def test_lengths():
    rng = np.random.default_rng(0)
    assert draw("fixed:7", 3, rng) == [7, 7, 7]
    assert np.mean(draw("exponential:300", 20_000, rng)) == pytest.approx(300, rel=0.03)
    many = draw("uniform:10:20", 1000, rng)
    assert min(many) == 10 and max(many) == 20
    assert min(draw("exponential:1", 100, rng)) == 1
    for wrong in ("uniform:3", "normal:3", "fixed:x", "fixed:nan", ""):
        with pytest.raises(UserError, match="must be fixed:N, uniform:LOW:HIGH or exponential:MEAN"):
            draw(wrong, 3, rng)


def test_rows_of_the_benches(tmp_path):
    assert parse_shape(str(TWO_B)) == TWO_B
    prompts = Workload(MID, "cpu").prompts
    assert [(size.prompt, size.patches) for size in sizes_of(MID)] == [
        (len(prompt.ids), prompt.patches) for prompt in prompts
    ]
    header = "op,peer,shape,dtype,metric,p20,p50,p80,device,date\n"
    shape, device = str(TWO_B), "NVIDIA H100 80GB HBM3"
    rows = [
        f"rollout,ours,{shape},bfloat16,ms,1,900,1,{device},2026-01-01",
        f"rollout,ours,{shape},bfloat16,ms,1,800,1,{device},2026-01-02",
        f"rollout,hf,{shape},bfloat16,ms,1,9000,1,{device},2026-01-02",
        f"rollout,ours,{MID},bfloat16,ms,1,7,1,{device},2026-01-03",
    ]
    update = f"update,ours,{shape},bfloat16,ms,1,300,1,{device},2026-01-02\n"
    (tmp_path / "rollout.csv").write_text(header + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match="no shape with rows of `ours`"):
        from_rows([tmp_path / "rollout.csv"], None)
    (tmp_path / "update.csv").write_text(header + update)
    files = [tmp_path / "rollout.csv", tmp_path / "update.csv"]
    start = from_rows(files, None)
    assert start.measured == Measured(2, 0.8, 0.0, 0.3) and not start.is_estimate
    assert start.rates == data_sheet(device, torch.bfloat16)
    for file in files:
        file.write_text(file.read_text().replace(device, "cpu with 2 threads"))
    with pytest.raises(UserError, match="device cpu with 2 threads: has no data sheet; name one with --device"):
        from_rows(files, None)
    assert from_rows(files, "A100").rates.bandwidth == 2.039e12
    with pytest.raises(UserError, match="not a shape of the benches"):
        parse_shape("mid prompts=4x1-2 G=8 completion=64")
    with pytest.raises(UserError, match=r"no\.csv: no such file"):
        from_rows([tmp_path / "no.csv"], None)


def test_an_estimate_says_so(tmp_path, capsys):
    arguments = ["--gpus", "1", "2", "16", "--prompts", "2", "--strong", "8", "--draws", "32"]
    assert scale.main([*arguments, "--lengths", "exponential:200", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "scale.md").read_text()
    assert text in capsys.readouterr().out
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 4 and all("estimate" in line for line in headings)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    half = estimate("Qwen2-VL-2B", "H100", 2, "fixed:100", (0.6, 0.2), 0)
    full = estimate("Qwen2-VL-2B", "H100", 2, "fixed:100", (0.3, 0.4), 0)
    assert half.measured.rollout == pytest.approx(full.measured.rollout / 2)
    assert half.measured.update > 1.8 * full.measured.update


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--link", "string"], "string: not a link"),
        (["--link", "-3"], "-3: not a link"),
        (["--overlap", "2"], "--overlap 2.0: must be between 0 and 1"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--device", "V100"], "device V100: has no data sheet"),
        (["--efficiency", "0", "1"], "must be above 0 and at most 1"),
        (["--prompts", "0"], "--prompts 0: must be at least 1"),
    ],
)
def test_impossible_settings(flags, message, capsys):
    assert scale.main(flags) == 2
    assert message in capsys.readouterr().err


def test_from_a_run(tmp_path, capsys):
    folder = tmp_path / "run"
    settings = {
        "eval_data": "none",
        "first_n": 32,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 20,
        "beta": 0.04,
        "roofline_steps": 1,
        "roofline_rates": "measured",
        "report_to": "none",
        "output_dir": str(folder),
    }
    Trainer(load_config(overrides=settings)).run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    start = from_run(read_recorded(folder))
    assert not start.is_estimate and start.measured.prompts == 4
    model = Model(start.work, start.measured, start.rates, FABRIC, draws=32)
    measured = sum(line["time/step"] for line in lines) / len(lines)
    assert model.predict(1, 4).step == pytest.approx(measured, rel=1e-9)
    tokens = sum(line["completions/mean_length"] for line in lines) / len(lines)
    assert model.tokens_a_prompt == pytest.approx(4 * tokens)
    assert 0 < start.measured.host < start.measured.rollout
    flags = ["--run", str(folder), "--gpus", "1", "2", "--draws", "32", "--output", str(tmp_path)]
    assert scale.main(flags) == 0
    assert "estimate" not in (tmp_path / "scale.md").read_text()
    assert math.isfinite(model.predict(64, 256).step)
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["rank"] = i // 8 % 2
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scale.main(flags) == 2
    assert "measured on 2 ranks" in capsys.readouterr().err


COUNTING = """
import json, sys
import torch.distributed as dist

sent = {"all_reduce": 0, "all_gather_into_tensor": 0}

def counted(name):
    real = getattr(dist, name)
    def call(*arguments, **named):
        whole = arguments[0] if arguments else named.get("output_tensor", named.get("tensor"))
        if whole.numel() > 1000:  # no norms and flags
            sent[name] += whole.nbytes
        return real(*arguments, **named)
    setattr(dist, name, call)

for name in sent:
    counted(name)

from vtfast.config import load_config
from vtfast.trainer import Trainer

settings = json.loads(sys.argv[-1])
trainer = Trainer(load_config(overrides=settings))
for name in sent:
    sent[name] = 0  # what the start sends
folder = trainer.run()
if trainer.session.ranks.is_main:
    (folder / "sent.json").write_text(json.dumps(sent))
"""


@pytest.mark.slow
def test_two_ranks_send_what_the_model_says(tmp_path):
    """Bytes that DeepSpeed hands to its collectives: the gradients whole in every pass, the weights once a step. And
    the page of a run on two ranks, whose work is shared out, is that of its own lines."""
    script, folder = tmp_path / "counting.py", tmp_path / "run"
    script.write_text(COUNTING)
    settings = {
        "eval_data": "none",
        "first_n": 32,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 20,
        "beta": 0.04,
        "roofline_steps": 1,
        "roofline_rates": "measured",
        "token_budget": 200,
        "report_to": "none",
        "output_dir": str(folder),
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*deepspeed_launcher(), str(script), json.dumps(settings)],
        env=outside_ranks() | {"DS_ACCELERATOR": "cpu", "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = read_recorded(folder)
    assert run.ranks == 2
    passes = [step.metrics["passes"] for step in run.steps]
    assert min(passes) > 1
    model = model_of(run.weights, run.steps[0].everyone[0])
    sent = json.loads((folder / "sent.json").read_text())
    assert sent["all_reduce"] == sum(passes) * model.bytes
    assert sent["all_gather_into_tensor"] == pytest.approx(len(passes) * model.bytes, rel=1e-3)
    assert set(roofline.differences(run)) == {1, 2}
    assert max(roofline.differences(run).values()) < 1e-6
    assert all(step.metrics["roofline/link"] > 0 for step in run.steps)


def test_from_there_on_means_all_beyond_as_well():
    """Gradients may be most of a small loss on few GPUs, and nothing beside the waiting on many."""

    def lost(gpus, waiting, reduce):
        blank = dict.fromkeys(("rollout", "score", "update", "optimizer", "gather", "rest"), 0.1)
        return Prediction(gpus, 8, waiting=waiting, reduce=reduce, passes=1, tokens=1.0, **blank)

    steps = [lost(1, 0.0, 0.0), lost(2, 0.0, 0.3), lost(4, 0.0, 0.0), lost(8, 0.9, 0.0)]
    assert reduce_dominates(steps) is None
    assert first_above(steps).gpus == 8
    assert reduce_dominates(steps[:2]).gpus == 2
    assert reduce_dominates([]) is None
