"""Padded steps, replayed steps and rare looks from the host give what plain steps give.

What a graph does to addresses is shown on the CPU by captures that replay the recorded step on the recorded rows; the
real ones are in test_gpu.
"""

import functools
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from rollouts import everything_is_free, tokens

from vtfast.model.loading import load_model
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.rollout.decode import Decoder
from vtfast.rollout.graphs import BUCKETS, bucket
from vtfast.rollout.row_state import PADDING_GROUP, OutputBuffer, RowState
from vtfast.rollout.scheduler import Scheduler

SAMPLING = Sampling(max_new_tokens=12)


class Recorder:
    """Stands in for CUDA's capture: remembers step and rows, and runs the warm-up as the real one does."""

    def __init__(self):
        self.captured = []

    def __call__(self, step, rows):
        assert not rows.active.any(), "a warm-up must not run over somebody's tokens"
        step(rows)
        self.captured.append(len(rows.token))
        return functools.partial(step, rows)


@pytest.fixture
def hasty(policy):
    """Ends one row in five at every token, so that batches shrink all the time."""
    return type(policy)(policy.module, tuple(range(0, policy.head.shape[0], 5)))


@pytest.mark.parametrize("steps_per_sync", [1, 3, 16])
@pytest.mark.parametrize("limits", [{}, {"max_rows": 7}])
def test_replayed_steps_equal_plain_ones(hasty, prompts, steps_per_sync, limits):
    many = [*prompts, *prompts[::-1]]
    plain = RolloutEngine(hasty)
    recorder = Recorder()
    graphs = RolloutEngine(hasty, graphs=True, capture=recorder, steps_per_sync=steps_per_sync, **limits)
    for seed in (1, 2):
        expected = plain.generate(many, 3, SAMPLING, seed=seed)
        found = graphs.generate(many, 3, SAMPLING, seed=seed)
        assert tokens(found) == tokens(expected) and everything_is_free(graphs)
        for a, b in zip(chain(*found), chain(*expected), strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
            assert a.finish_reason == b.finish_reason
        if seed == 1:
            first = list(recorder.captured)
    assert first and set(recorder.captured) <= set(BUCKETS)
    assert len(set(recorder.captured)) == len(recorder.captured), "every size once, for both calls"


def test_each_setting_has_graphs_of_its_own(policy, prompts):
    recorder = Recorder()
    engine = RolloutEngine(policy, graphs=True, capture=recorder, steps_per_sync=4)
    settings = [
        SAMPLING,
        Sampling(max_new_tokens=12, temperature=0.5),
        Sampling(max_new_tokens=12, greedy=True),
        Sampling(max_new_tokens=5),
        Sampling(max_new_tokens=12, top_k=3),
    ]
    for sampling in [*settings, *settings]:
        expected = RolloutEngine(policy).generate(prompts, 2, sampling, seed=3)
        assert tokens(engine.generate(prompts, 2, sampling, seed=3)) == tokens(expected)
    assert len(recorder.captured) == 3, "a limit is read on the device, a warped step is not captured"


def test_weights_changed_in_place_are_seen_and_moved_ones_captured_anew(random_path, prompts):
    policy, recorder = load_model(random_path), Recorder()
    engine = RolloutEngine(policy, graphs=True, capture=recorder)
    before = tokens(engine.generate(prompts, 2, SAMPLING))
    work = engine.workspace
    with torch.no_grad():
        for layer in policy.language_model.layers:
            for module in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
                module.weight.mul_(3.0)
    expected = tokens(RolloutEngine(policy).generate(prompts, 2, SAMPLING))
    assert tokens(engine.generate(prompts, 2, SAMPLING)) == expected != before
    assert engine.workspace is work and len(recorder.captured) == 1
    weight = policy.language_model.layers[0].mlp.down_proj.weight
    weight.data = -weight.data
    expected = tokens(RolloutEngine(policy).generate(prompts, 2, SAMPLING))
    assert tokens(engine.generate(prompts, 2, SAMPLING)) == expected
    assert engine.workspace is not work and len(recorder.captured) == 2


def test_the_workspace_grows_and_is_freed_on_request(policy, prompts):
    engine = RolloutEngine(policy)
    engine.generate(prompts, 4, SAMPLING)
    work = engine.workspace
    engine.generate(prompts[:1], 2, Sampling(max_new_tokens=3))
    assert engine.workspace is work, "a smaller call works in what is there"
    engine.generate(prompts, 4, Sampling(max_new_tokens=40))
    assert engine.workspace is not work
    engine = RolloutEngine(policy, keep_cache=False)
    assert tokens(engine.generate(prompts, 2, SAMPLING)) and engine.workspace is None


def test_calls_of_different_shapes_settle_in_one_workspace(policy, prompts):
    recorder = Recorder()
    engine = RolloutEngine(policy, graphs=True, capture=recorder, steps_per_sync=4)
    shapes = [(prompts[:1], 4, 30), (prompts * 3, 1, 4), (prompts[1:3], 2, 12)]
    seen = []
    for _ in range(3):
        for asked, group, new in shapes:
            expected = RolloutEngine(policy).generate(asked, group, Sampling(max_new_tokens=new), seed=7)
            found = engine.generate(asked, group, Sampling(max_new_tokens=new), seed=7)
            assert tokens(found) == tokens(expected)
            seen.append(engine.workspace)
    assert len(set(map(id, seen[2:]))) == 1, "the first calls say how large it has to be"


def test_other_end_tokens_are_seen(policy, prompts):
    changing = type(policy)(policy.module, ())
    engine = RolloutEngine(changing)
    assert all(len(c.tokens) == 12 for g in engine.generate(prompts, 3, SAMPLING) for c in g)
    changing.eos_ids = tuple(range(policy.head.shape[0]))
    assert all(len(c.tokens) == 1 for g in engine.generate(prompts, 3, SAMPLING) for c in g)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.enable_grad])
def test_what_the_caller_is_in_does_not_matter(policy, prompts, inside):
    engine = RolloutEngine(policy)
    expected = tokens(RolloutEngine(policy).generate(prompts, 2, SAMPLING))
    with inside():
        assert tokens(engine.generate(prompts, 2, SAMPLING)) == expected
    assert tokens(engine.generate(prompts, 2, SAMPLING)) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokens(engine.generate(prompts, 2, SAMPLING)) == expected
    assert not engine.workspace.cache.keys.requires_grad


def test_no_more_steps_than_tokens_are_asked_for(policy, prompts, monkeypatch):
    steps, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *a: steps.append(1) or step(*a))
    endless = type(policy)(policy.module, ())
    RolloutEngine(endless, steps_per_sync=16).generate(prompts, 2, Sampling(max_new_tokens=20))
    assert len(steps) == 19, "the first token is the prefill's"


def test_an_interrupted_call_leaves_no_numbers(random_path, prompts, monkeypatch):
    policy = load_model(random_path)
    engine = RolloutEngine(policy)
    expected = tokens(engine.generate(prompts, 3, SAMPLING, seed=1))
    weight = policy.language_model.layers[0].self_attn.v_proj.weight
    saved = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scheduler, "finish_rows", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        engine.generate(prompts, 3, SAMPLING, seed=1)
    weight.data.copy_(saved)
    assert tokens(engine.generate(prompts, 3, SAMPLING, seed=1)) == expected


def test_numbers_of_a_broken_model_do_not_outlive_it(random_path, prompts):
    policy = load_model(random_path)
    engine = RolloutEngine(policy)
    expected = tokens(engine.generate(prompts, 3, Sampling(max_new_tokens=24), seed=1))
    weight = policy.language_model.layers[0].self_attn.v_proj.weight
    saved = weight.detach().clone()
    weight.data.fill_(torch.nan)
    engine.generate(prompts, 3, Sampling(max_new_tokens=24), seed=1)
    weight.data.copy_(saved)
    assert tokens(engine.generate(prompts, 3, Sampling(max_new_tokens=24), seed=1)) == expected


def test_the_triton_kernels_make_the_same_rollout(random_path):
    """All of a decode step's kernels under the interpreter, with padded rows and replayed steps."""
    script = Path(__file__).parents[1] / "helpers/with_interpreter.py"
    done = subprocess.run([sys.executable, script, random_path], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_commit_writes_live_rows_only():
    rows, output = RowState.empty(4, 2, "cpu"), OutputBuffer.empty(3, 2, "cpu")
    rows.output_row.copy_(torch.tensor([2, 0, 1, 0]))
    rows.active.copy_(torch.tensor([True, True, False, False]))
    rows.num_generated.copy_(torch.tensor([0, 1, 2, 0]))
    token, logp = torch.tensor([7, 8, 9, 5]), -torch.arange(1.0, 5.0)
    output.append(rows, token, logp, torch.tensor(2), torch.tensor([7]))
    assert output.tokens[:3].tolist() == [[0, 8, 0], [0, 0, 0], [7, 0, 0]]
    assert output.logps[2, 0] == -1 and output.logps[0, 1] == -2
    assert rows.num_generated.tolist() == [1, 2, 2, 0]
    assert not rows.active.any(), "one ended by its token, one by the limit"


def test_rows_move_to_the_front():
    rows = RowState.empty(5, 2, "cpu")
    rows.group.copy_(torch.arange(5))
    rows.token.copy_(torch.arange(5) + 10)
    rows.active.fill_(True)
    rows.slice(0, 4).compact(torch.tensor([1, 3]))
    assert rows.token.tolist() == [11, 13, 0, 0, 14]
    assert rows.group.tolist() == [1, 3, PADDING_GROUP, PADDING_GROUP, 4]
    assert rows.active.tolist() == [True, True, False, False, True]


def test_buckets():
    assert [bucket(n) for n in (1, 3, 9, 64, 65, 512, 513)] == [1, 4, 16, 64, 96, 512, 1024]
