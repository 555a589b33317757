"""Running out of memory changes how a batch is cut and how many rows are in flight, and no result."""

import json
import shutil
import subprocess
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from launchers import ROOT, SHORT, assert_close_runs, deepspeed_launcher, environment, run
from make_trainer import answered, asked, assert_same, make, state
from whole_runs import assert_same_run, build, rows

from vtfast import trainer as trainer_module
from vtfast.cli.main import main
from vtfast.data.prompt import Prompt
from vtfast.distributed.ranks import Ranks
from vtfast.rollout import RolloutEngine, Sampling, scheduler
from vtfast.rollout import engine as rollout_engine
from vtfast.training import setup
from vtfast.training.token_budget import TokenBudget, resplit
from vtfast.utils.errors import RankError, UserError
from vtfast.utils.out_of_memory import is_out_of_memory
from vtfast.utils.text import first_line

ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand so on")
ON_CPU = RuntimeError("alloc_cpu.cpp:124: DefaultCPUAllocator: can't allocate memory: you tried 9")
OF_PYTHON = MemoryError()


def fails_at(call, error, function):
    """`function`, but for call number `call` (from 1; None: every one)."""
    calls = []

    def failing(*arguments, **settings):
        calls.append(1)
        if call in (None, len(calls)):
            raise error
        return function(*arguments, **settings)

    return failing


def spoil(trainer, where, monkeypatch, call=2, error=ON_CUDA):
    """Let the pass number `call` of the next update run out of memory."""
    if where == "forward":
        monkeypatch.setattr(trainer.session.engine, "forward", fails_at(call, error, trainer.session.engine.forward))
        return
    # In the middle of the model: the gradients behind it lie in ZeRO's buckets by then.
    weight = trainer.session.policy.language_model.layers[1].mlp.up_proj.weight
    weight.register_hook(fails_at(call, error, lambda gradient: None))


# A rollout's cache would be freed first, in place of a smaller budget.
NO_CACHE = {"rollout_keep_cache": False}
# Adam's first step is the gradient's sign, even where the gradient is nothing but rounding. With this epsilon it is
# the gradient itself.
PROPORTIONAL = NO_CACHE | {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0, "warmup_steps": 0}


def updated(folder, *, spoilt=None, **settings):
    """One update, disturbed or not -> (trainer, its work in the end, what the update returned)."""
    trainer = make(folder, **{"beta": 0.04} | PROPORTIONAL | settings)
    work = trainer.balance(answered(trainer), 1)
    work = trainer.score_logprobs(work, 1)
    if spoilt:
        spoilt(trainer)
    *result, work = trainer.update(work, 1)
    return trainer, work, result


@pytest.mark.parametrize(
    ("where", "error", "dtype", "bucket"),
    [
        ("forward", ON_CUDA, "float32", 10**8),
        ("backward", ON_CPU, "float32", 10**8),
        ("backward", OF_PYTHON, "bfloat16", 10**8),
        ("backward", ON_CUDA, "float32", 3000),
    ],
)
def test_an_update_that_runs_out_of_memory_is_made_in_smaller_passes(
    tmp_path, monkeypatch, caplog, where, error, dtype, bucket
):
    """Bit for bit what passes of that size make from the beginning: nothing is left of the pass that failed, and of
    the one before it. `bucket`: elements that ZeRO reduces together; some weights have more than 3000.
    Without a KL: the reference model's log-probs come from larger passes, which some CPUs round otherwise."""

    def disturbed(trainer):
        trainer.session.engine.optimizer.reduce_bucket_size = bucket
        spoil(trainer, where, monkeypatch, error=error)

    with caplog.at_level("WARNING", logger="vtfast"):
        tight, work, result = updated(tmp_path / "tight", token_budget=260, dtype=dtype, beta=0.0, spoilt=disturbed)
    budget = tight.session.budget.tokens
    assert 80 < budget <= 130
    (said,) = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert f"token budget 260 -> {budget}, the same batch again in {len(work.micro_batches)} micro-batches" in said
    assert first_line(error) in said
    said = json.loads((tmp_path / "tight" / "memory.json").read_text())
    assert said == {"token_budget": {"1": budget}}

    assert tight.session.engine.optimizer._backward_active_depth == 0

    small, same, expected = updated(tmp_path / "small", token_budget=budget, dtype=dtype, beta=0.0)
    assert [batch.parts for batch in work.micro_batches] == [batch.parts for batch in same.micro_batches]
    assert result == expected
    assert_same(state(tight), state(small))
    assert not (tmp_path / "small" / "memory.json").exists()


def test_the_result_is_that_of_the_undisturbed_update(tmp_path, monkeypatch):
    """Within the rounding of another order of summation. Groups are split here, and passes are halved twice."""
    plain, one, (sums, norm, _) = updated(tmp_path / "plain", token_budget=1000)

    def twice(trainer):
        forward = fails_at(1, ON_CUDA, trainer.session.engine.forward)
        monkeypatch.setattr(trainer.session.engine, "forward", fails_at(3, ON_CPU, forward))

    tight, many, (again, same_norm, _) = updated(tmp_path / "tight", token_budget=1000, spoilt=twice)
    assert len(one.micro_batches) == 1 and len(many.micro_batches) > 3
    assert any(len(part.members) < 4 for batch in many.micro_batches for part in batch.parts)
    assert same_norm == pytest.approx(norm, rel=1e-4) and norm > 0
    assert again == pytest.approx(sums, rel=1e-4, abs=1e-5)
    for name, weight in plain.session.policy.module.named_parameters():
        other = tight.session.policy.module.get_parameter(name)
        torch.testing.assert_close(other, weight, rtol=1e-5, atol=2e-6, msg=name)


def test_the_second_update_on_the_same_answers_keeps_the_old_log_probs(tmp_path, monkeypatch):
    """They are those of the weights that answered, which are gone when the batch is cut again."""
    results = []
    for name in ("plain", "tight"):
        trainer = make(tmp_path / name, num_iterations=2, epsilon=0.05, token_budget=1000, **PROPORTIONAL)
        questions = next(asked(trainer, [1]))
        trainer.step(1, questions)
        old = {id(g): torch.cat(g.logprobs["old"]).clone() for g in trainer.experience.groups}
        if name == "tight":
            spoil(trainer, "backward", monkeypatch, call=1)
        metrics, _ = trainer.step(2, None)
        assert all(torch.cat(g.logprobs["old"]).equal(old[id(g)]) for g in trainer.experience.groups)
        results.append(metrics)
    plain, tight = results
    assert (plain["passes"], plain["token_budget"]) == (1, 1000)
    assert tight["passes"] > 1 and tight["token_budget"] < 500
    for name in ("loss", "grad_norm", "clip_ratio/low", "clip_ratio/high", "entropy"):
        assert tight[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6), name
    assert tight["grad_norm"] > 0 and tight["clip_ratio/low"] + tight["clip_ratio/high"] > 0


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_the_rollouts_cache_is_freed_first(tmp_path, monkeypatch, caplog, where):
    """To the bit, for the batch is cut as before. Later rollouts free it at once, and then the budget is halved."""
    ends = []
    for name in ("plain", "tight"):
        trainer = make(tmp_path / name, beta=0.04, token_budget=260)
        engine = trainer.session.rollout_engine
        work = trainer.score_logprobs(trainer.balance(answered(trainer), 1), 1)
        assert engine.workspace is not None
        if name == "tight":
            if where == "optimizer":
                adam = trainer.session.engine.optimizer.optimizer
                monkeypatch.setattr(adam, "step", fails_at(1, ON_CUDA, adam.step))
            else:
                spoil(trainer, where, monkeypatch)
            with caplog.at_level("WARNING", logger="vtfast"):
                trainer.update(work, 1)
            assert "the rollout's cache is freed, now and after every rollout" in caplog.text
            assert engine.workspace is None and not engine.keep_cache
        else:
            trainer.update(work, 1)
        assert trainer.session.budget.tokens == 260 and not (tmp_path / name / "memory.json").exists()
        ends.append(state(trainer))
    assert_same(*ends)
    spoil(trainer, "forward", monkeypatch)
    trainer.step(2, next(asked(trainer, [2])))
    assert engine.workspace is None and trainer.session.budget.tokens < 260


def test_a_half_done_optimizer_step_is_not_repeated(tmp_path, monkeypatch):
    trainer = make(tmp_path, token_budget=260)
    work = trainer.balance(answered(trainer), 1)
    adam = trainer.session.engine.optimizer.optimizer
    step = adam.step

    def half(*arguments):
        step(*arguments)
        raise ON_CUDA

    monkeypatch.setattr(adam, "step", half)
    with pytest.raises(UserError, match=r"step 1: out of memory while the optimizer .* --resume_from_checkpoint last"):
        trainer.update(work, 1)


def test_memory_that_is_short_elsewhere_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer_module, "grpo_metrics", fails_at(1, ON_CUDA, None))
    flags = ["--max_steps", "1", "--eval_data", "none", "--num_generations", "2", "--max_completion_length", "4"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "error: step 1, update: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); lower" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_completion_a_pass_is_the_least(tmp_path, monkeypatch, where):
    trainer = make(tmp_path, **PROPORTIONAL)
    groups = answered(trainer)
    work = trainer.balance(groups, 1)
    least = max(len(g.prompt.ids) + n for g in groups for n in g.lengths)
    spoil(trainer, where, monkeypatch, call=None)
    with pytest.raises(UserError, match=rf"one completion in a micro-batch, {least} tokens.*; lower --max_c"):
        trainer.update(work, 1)
    assert trainer.session.budget.tokens == least


def test_other_errors_are_not_memorys(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    work = trainer.balance(answered(trainer), 1)
    spoil(trainer, "forward", monkeypatch, call=1, error=RuntimeError("mat1 and mat2 differ"))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.update(work, 1)
    assert not (tmp_path / "memory.json").exists()
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


def test_scoring_is_cut_again_too(tmp_path, monkeypatch):
    """Log-probs of the reference, and the steps after it go on with what the memory does for."""
    scores, trainers = [], []
    for name, call in (("plain", 0), ("tight", 2)):
        trainer = make(tmp_path / name, beta=0.04, token_budget=260, **NO_CACHE)
        failing = fails_at(call, ON_CUDA, trainer_module.packed_logprobs)
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "packed_logprobs", failing)
            trainer.step(1, next(asked(trainer, [1])))
        scores.append(torch.cat([torch.cat(g.logprobs["reference"]) for g in trainer.experience.groups]))
        trainers.append(trainer)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)
    budget = trainers[1].session.budget.tokens
    assert trainers[0].session.budget.tokens == 260 and 80 < budget <= 130
    metrics, _ = trainers[1].step(2, next(asked(trainers[1], [2])))
    assert metrics["token_budget"] == budget
    assert max(len(batch.pack.ids) for batch in trainers[1].experience.batches.micro_batches) <= budget


ALONE = Ranks(0, 1, torch.device("cpu"))


def test_a_run_goes_on_with_what_its_memory_did_for(tmp_path, caplog):
    file = tmp_path / "memory.json"
    assert TokenBudget(700, tmp_path, ALONE).tokens == 700
    file.write_text('{"token_budget": {"4": 350, "9": 175}}')
    with caplog.at_level("INFO", logger="vtfast"):
        budget = TokenBudget(700, tmp_path, ALONE)
    assert f"token budget 350 from step 4 on ({file})" in caplog.text
    assert [budget.set_for_step(step) for step in (1, 3, 4, 8, 9, 99)] == [700, 700, 350, 350, 175, 175]
    assert budget.tokens == 175
    lower = TokenBudget(200, tmp_path, ALONE)
    assert [lower.set_for_step(4), lower.set_for_step(9)] == [200, 175], "lower settings are obeyed"
    for text in (
        "",
        "{",
        "[]",
        "{}",
        '{"token_budget": 350}',
        '{"token_budget": {"x": 9}}',
        "\x00",
        *(f'{{"token_budget": {{"1": {tokens}}}}}' for tokens in ("0", "-1", '"9"', "true", "1.5")),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=r"memory\.json: .*remove"):
            TokenBudget(700, tmp_path, ALONE)


def out_of_memory_at(number, folder, monkeypatch, **settings):
    """A run whose update of step `number` runs out of memory in its second pass, once."""
    trainer = build(output_dir=str(folder), **settings)
    one_step = trainer.step

    def spoilt(step, questions):
        if step == number:
            spoil(trainer, "forward", monkeypatch)
        return one_step(step, questions)

    trainer.step = spoilt
    trainer.run()
    return folder


DICE = {"reward_funcs": "whole_runs:noisy_reward", "reward_workers": 0}
RESUMED = {
    "sft": {"recipe": "tiny-spatial-sft"},
    "grpo": DICE,
    "reference": DICE | {"beta": 0.04},
    "twice": DICE | {"num_iterations": 2},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in ("reference", "twice") else k for k in RESUMED]
)
def test_a_run_that_ran_out_of_memory_is_resumed_to_the_bit(kind, tmp_path, questions, monkeypatch):
    """From before the step that it happened in, and from behind it, where nobody runs out of memory again."""
    settings = questions | NO_CACHE | {"eval_data": "none", "token_budget": 150} | RESUMED[kind]
    whole = out_of_memory_at(3, tmp_path / "whole", monkeypatch, **settings)
    monkeypatch.undo()
    budgets = [row["token_budget"] for row in rows(whole)]
    assert budgets[0] == budgets[1] == 150 > budgets[2] == budgets[3]
    saved = sorted((whole / "checkpoints").iterdir())
    assert [path.name for path in saved][-2:] in (["step-3", "step-4"], ["step-2", "step-4"])
    for path in saved[:-1:2]:
        copy = shutil.copytree(whole, tmp_path / f"from-{path.name}")
        build(resume_from_checkpoint=str(copy / "checkpoints" / path.name), **settings).run()
        assert_same_run(whole, copy)


def test_a_batch_of_answers_is_cut_for_all_of_its_uses(tmp_path):
    """Those of steps 3 and 4 are cut in step 3; memory was short in the second use, and several ranks would not survive
    that again."""
    trainer = make(tmp_path, num_iterations=2, token_budget=1000)
    trainer.session.budget.by_first_step = {4: 120}
    budgets = []
    for step, questions in zip((1, 3), asked(trainer, (1, 3)), strict=True):
        budgets += [trainer.step(step, questions)[0], trainer.step(step + 1, None)[0]]
    assert [metrics["token_budget"] for metrics in budgets] == [1000, 1000, 120, 120]


def test_the_agreement_of_ranks_waits_as_long_as_any_collective(tmp_path, monkeypatch):
    """It has a group of its own beside NCCL's, with `--ddp_timeout` in place of torch's half an hour."""
    made = []

    def of_two(tokens, folder, ranks, *more, **named):
        with monkeypatch.context() as patch:
            patch.setattr(dist, "get_backend", lambda: "nccl")
            patch.setattr(dist, "new_group", lambda **given: made.append(given))
            return TokenBudget(tokens, folder, Others(0, 2, ranks.device), *more, **named)

    monkeypatch.setattr(setup, "TokenBudget", of_two)
    make(tmp_path, ddp_timeout=77)
    assert made == [{"backend": "gloo", "timeout": timedelta(seconds=77)}]


class Others(Ranks):
    """A rank among two, whose other one needs five passes."""

    def gather(self, value):
        return [value, 5]

    def from_main(self, value):
        return value


def test_a_batch_is_cut_into_equally_many_passes_on_all_ranks(tmp_path):
    trainer = make(tmp_path, token_budget=1000)
    work = trainer.balance(answered(trainer), 1)
    before = [sequence for batch in work.micro_batches for sequence in batch.sequences]
    for budget, ranks in ((1000, ALONE), (300, ALONE), (90, ALONE), (1, ALONE)):
        cut = resplit(work, budget, ranks)
        after = [sequence for batch in cut for sequence in batch.sequences]
        assert sorted((id(g), i) for g, i in after) == sorted((id(g), i) for g, i in before)
        for batch in cut:
            assert len(batch.pack.ids) == sum(part.tokens for part in batch.parts)
            assert len(batch.pack.ids) <= budget or len(batch.sequences) == 1
        work = replace(work, micro_batches=cut)  # what was split is split again
    assert len(cut) == len(before), "one completion in each"
    cut = resplit(work, 1000, Others(0, 2, torch.device("cpu")))
    assert [bool(batch.parts) for batch in cut] == [True, False, False, False, False]


# In the rollout

SAMPLING = Sampling(max_new_tokens=12)


def tokens(groups):
    return [[completion.tokens for completion in group] for group in groups]


@pytest.mark.parametrize("where", ["workspace", "prefill", "decode"])
def test_a_rollout_that_runs_out_of_memory_admits_fewer_rows(policy, prompts, monkeypatch, caplog, where):
    owner = {
        "workspace": (rollout_engine, "Workspace"),
        "prefill": (scheduler.Scheduler, "prefill"),
        "decode": (scheduler.Scheduler, "decode"),
    }[where]
    expected = RolloutEngine(policy).generate(prompts, 3, SAMPLING, seed=1)
    engine = RolloutEngine(policy)
    plain = getattr(*owner)
    failing = fails_at(2, ON_CPU, fails_at(1, ON_CUDA, plain))
    monkeypatch.setattr(*owner, lambda *args, **kwargs: failing(*args, **kwargs))
    with caplog.at_level("WARNING", logger="vtfast"):
        got = engine.generate(prompts, 3, SAMPLING, seed=1)
    assert tokens(got) == tokens(expected)
    assert engine.max_rows == 3 and "running rows 12 -> 6" in caplog.text
    assert "running rows 6 -> 3, cache pages" in caplog.text and len(caplog.records) == 2
    held = engine.workspace.cache
    assert held.pages == engine.max_pages and len(held.free) == held.pages
    assert tokens(engine.generate(prompts, 3, SAMPLING, seed=1)) == tokens(expected)
    assert len(caplog.records) == 2, "later calls are admitted so from the beginning"


def text_prompt(length):
    places = torch.arange(length)
    return Prompt(places + 5, places.expand(3, -1))


def test_a_cache_that_was_halved_grows_for_a_larger_group(policy, monkeypatch):
    """It was halved to the least of one call, and another may need more."""
    engine = RolloutEngine(policy, cache_tokens=128)
    failing = fails_at(1, ON_CUDA, scheduler.Scheduler.decode)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.Scheduler, "decode", lambda self: failing(self))
        engine.generate([text_prompt(31)] * 4, 2, SAMPLING)
    before = engine.workspace.cache.pages
    assert before == 1 + 2 * 2, "one whole page of the prompt, two more a row"
    expected = RolloutEngine(policy).generate([text_prompt(32)], 2, SAMPLING)
    assert tokens(engine.generate([text_prompt(32)], 2, SAMPLING)) == tokens(expected)
    assert engine.workspace.cache.pages == before + 1


def test_one_group_is_the_least_of_a_rollout(policy, prompts, monkeypatch):
    engine = RolloutEngine(policy)
    monkeypatch.setattr(scheduler.Scheduler, "prefill", fails_at(None, ON_CPU, None))
    with pytest.raises(RankError, match=r"the 3 completions of one prompt running; lower --num"):
        engine.generate(prompts, 3, SAMPLING)
    assert engine.workspace is None


def test_a_cache_of_a_given_size_is_halved_too(policy, prompts, monkeypatch):
    engine = RolloutEngine(policy, cache_tokens=4096)
    expected = engine.generate(prompts, 3, SAMPLING, seed=1)
    before = engine.workspace.cache.pages
    decode = scheduler.Scheduler.decode
    failing = fails_at(2, ON_CUDA, decode)
    monkeypatch.setattr(scheduler.Scheduler, "decode", lambda self: failing(self))
    assert tokens(engine.generate(prompts, 3, SAMPLING, seed=1)) == tokens(expected)
    assert engine.workspace.cache.pages == before // 2


# Two ranks

SCRIPT = """
import sys
import torch
from torch import distributed
from vtfast.training.update import Updater

accumulate, calls = Updater.accumulate, []
def spoilt(self, step, batches, counts):
    calls.append(1)
    if self.ranks.rank == 1 and len(calls) == 2:
        {spoil}
    return accumulate(self, step, batches, counts)
Updater.accumulate = spoilt

def once(*_):
    for handle in handles:
        handle.remove()
    raise torch.OutOfMemoryError("CUDA out of memory (planted).")

from vtfast.cli.main import main
handles = []
sys.exit(main(["train", *sys.argv[1:]]))
"""
IN_FORWARD = "handles.append(self.policy.language_model.layers[1].register_forward_hook(once))"
IN_BACKWARD = "handles.append(self.policy.language_model.layers[1].mlp.up_proj.weight.register_hook(once))"
LAUNCHER = deepspeed_launcher()
TWO = ["--per_device_train_batch_size", "4", "--eval_data", "none", "--beta", "0.04"]
EVERY = ["--save_steps", "1"]


@pytest.mark.slow
def test_two_ranks_halve_together_behind_a_forward_pass(tmp_path):
    run(tmp_path / "plain", *TWO, launcher=LAUNCHER)
    done = launched(tmp_path, IN_FORWARD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2: out of memory (rank 1: CUDA out of memory (planted).); token budget" in done.stderr
    assert_close_runs(tmp_path / "plain", tmp_path / "tight")
    lines = [json.loads(x) for x in (tmp_path / "tight" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["token_budget"] > lines[1]["token_budget"] == lines[2]["token_budget"]


@pytest.mark.slow
def test_a_rank_that_fails_in_backward_ends_all_and_leaves_a_smaller_budget(tmp_path):
    done = launched(tmp_path, IN_BACKWARD)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count("rank 1: out of memory in step 2, in the backward pass of") == 1
    known = json.loads((tmp_path / "tight" / "memory.json").read_text())["token_budget"]
    ((step, budget),) = known.items()
    assert step == "2" and f"the next run in this folder starts with {budget}" in said
    lines = run(tmp_path / "tight", *TWO, *EVERY, "--resume_from_checkpoint", "last", launcher=LAUNCHER)
    assert lines[0]["token_budget"] > budget == lines[1]["token_budget"] == lines[2]["token_budget"]
    assert lines[1]["passes"] > lines[0]["passes"]


def launched(tmp_path, spoil):
    script = tmp_path / "spoilt.py"
    script.write_text(SCRIPT.format(spoil=spoil))
    command = [*LAUNCHER, str(script), *SHORT, *TWO, *EVERY, "--output_dir", tmp_path / "tight"]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=500)
