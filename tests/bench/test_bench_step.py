"""`bench step`: its clocks, what its contestants share, and that it reports nothing when they do not learn the same."""

import csv
import threading
from dataclasses import replace

import pytest
import torch

from bench import _harness, step
from bench._phases import Phases
from bench._task import given_completions, make_task, variety
from bench._workload import REHEARSAL

pytest.importorskip("deepspeed")
TICK = 1000.0
"""Seconds of a planted delay."""


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def slow(self, owner, method, seconds=TICK):
        """Every call of `owner.method` takes `seconds` more."""
        inner = getattr(owner, method)

        def slower(*args, **kwargs):
            self.now += seconds
            return inner(*args, **kwargs)

        setattr(owner, method, slower)


@pytest.fixture(scope="module")
def task():
    with make_task(REHEARSAL, "cpu", 1, torch.float32) as made:
        yield made


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (_harness, step):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def rows_of(folder):
    with (folder / "step.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_phase_counts_without_those_inside_it():
    clock = Clock()
    phases = Phases(clock)
    with phases.phase("update"):
        clock.now += 50  # no step is open: nothing is counted
    for extra in (0, 1):
        with phases.step():
            clock.now += 1
            with phases.phase("update"):
                clock.now += 2
                with phases.phase("optimizer"):
                    clock.now += 4 + extra
                clock.now += 8
            clock.now += 16
    assert phases.steps[0] == {"rest": 17, "update": 10, "optimizer": 4}
    assert phases.totals() == [31, 32]
    assert phases.medians(("optimizer", "data")) == {"optimizer": 4.5, "data": 0}


def test_a_phase_that_raises_is_closed():
    clock = Clock()
    phases = Phases(clock)
    with pytest.raises(KeyError), phases.step(), phases.phase("update"):
        clock.now += 1
        raise KeyError
    with phases.step():
        clock.now += 2
    assert phases.steps == [{"rest": 0, "update": 1}, {"rest": 2}]


def seat(name, task, clock):
    phases = Phases(clock)
    return step.contestant(name)(task, phases), phases


def test_a_second_encoding_of_the_image_and_a_slow_update_show_where_they_are(task, results, capsys):
    """In the phase that holds them alone, and in the ratio."""
    clock = Clock()
    player, phases = seat("ours", task, clock)
    policies = {"rollout": player.trainer.session.policy, "reference": player.trainer.reference.copy}
    for policy in policies.values():
        clock.slow(policy.vision, "encode")
    player.step()
    plain = phases.steps[-1]
    assert {phase: seconds for phase, seconds in plain.items() if seconds} == {
        "rollout": TICK,
        "reference": TICK,
        "update": TICK,
    }

    clock.slow(policies["rollout"].vision, "encode")  # every image encoded twice by the policy, once by the reference
    clock.slow(player.trainer.session.updater, "update", 3 * TICK)
    player.step()
    player.close()
    slowed = phases.steps[-1]
    assert {phase: seconds for phase, seconds in slowed.items() if seconds} == {
        "rollout": 2 * TICK,
        "reference": TICK,
        "update": 5 * TICK,
    }
    assert phases.totals() == [3 * TICK, 8 * TICK]


def test_a_slow_step_changes_ratio_and_table(results, capsys):
    def measured(update):
        phases = Phases()
        phases.steps = [{"rollout": 1.0, "update": update, "rest": 0.5}] * 3
        return phases

    for seconds in (0.5, 2.5):
        peers = {"ours": measured(seconds), "trl": measured(6.5), "original": measured(14.5)}
        met = step.report(step.MID, "cpu", peers, {})
        assert met == (seconds == 0.5)
    first, second = (rows for rows in (rows_of(results)[:24], rows_of(results)[24:]))
    ratio = [float(r["ratio"]) for rows in (first, second) for r in rows if r["ratio"] and r["peer"] == "trl"]
    assert ratio == [0.25, 0.5]
    update = {r["p50"] for r in second if r["peer"] == "ours" and r["metric"] == "update ms"}
    assert update == {"2500"}
    assert "NOT met" in capsys.readouterr().out
    step.picture({"mid": peers}, "cpu", results / "step.png")
    assert (results / "step.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_rewards_and_lengths_are_the_same_for_all(task):
    pytest.importorskip("trl")
    players = {name: seat(name, task, Clock())[0] for name in step.CONTESTANTS}
    for player in players.values():
        player.step()
    groups = sorted(players["ours"].trainer.experience.groups, key=lambda group: group.sample.row)
    trl = players["trl"].trainer
    batch, log = trl._buffered_inputs[0], trl._logs
    for player in players.values():
        player.close()
    G, n = task.shape.G, task.shape.completion
    prompts = {
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert prompts == {tuple(group.prompt.ids.tolist()) for group in groups}
    assert [len(group.prompt.ids) for group in groups] == [36, 48]
    assert batch["completion_mask"].sum(1).tolist() == [n] * G * len(groups)
    assert {length for group in groups for length in group.lengths} == {n}
    ours = torch.cat([group.prompt.pixels for group in groups]).sort(0)[0]
    pixels = batch["pixel_values"].sort(0)[0]
    assert torch.equal(pixels[::G], ours)  # every image G times
    answers = [message[0]["content"] for message in log["completion"]]
    assert list(log["rewards"]["reward"]) == pytest.approx([variety(text) for text in answers])


def test_a_peer_that_fails_leaves_and_the_others_go_on(monkeypatch, results, capsys):
    """In its warm-up, or in a timed round."""
    from bench import _original

    class Full(_original.Original):
        steps = 0

        def step(self):
            Full.steps += 1
            if Full.steps == limit:
                raise torch.OutOfMemoryError("planted")
            super().step()

    monkeypatch.setattr(_original, "Original", Full)
    monkeypatch.setitem(step.CONTESTANTS, "trl", "_not_there:TRL")
    for limit in (1, 2):
        Full.steps = 0
        measured, absent = step.measure(REHEARSAL, "cpu", 2, 2, 1)
        assert absent["original"] == "failed" and Full.steps == limit
        assert list(measured) == ["ours"] and len(measured["ours"].steps) == 2
    assert "planted" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [False, True])
def test_all_learn_the_same(missing, monkeypatch, results, capsys):
    """And a peer that is not there is a row that says so."""
    if missing:
        monkeypatch.setitem(step.CONTESTANTS, "trl", "_not_there:TRL")
    else:
        pytest.importorskip("trl")
    apart = step.disagreements(REHEARSAL, "cpu", 1)
    assert set(apart) == {"trl", "original"} - ({"trl"} if missing else set())
    assert all(value < 1e-5 for value in apart.values())
    if missing:
        step.report(REHEARSAL, "cpu", *step.measure(REHEARSAL, "cpu", 1, 1, 1))
        (row,) = (row for row in rows_of(results) if row["metric"] == "not installed")
        assert row["peer"] == "trl" and row["p50"] == ""


def test_distance_is_the_worst_tensors():
    ours = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 0.1])}
    assert step.distance(ours, ours) == 0
    theirs = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 0.0])}
    assert step.distance(ours, theirs) == pytest.approx(0.5 / (9 + 4.5**2) ** 0.5)
    theirs["b"] = torch.tensor([0.0, 1.0])  # an average tensor's worth of movement, nearly all of it wrong
    assert step.distance(ours, theirs) == pytest.approx(0.9 / (1 + (9 + 4.5**2) ** 0.5) * 2)
    theirs["a"][0] = float("nan")
    assert not step.distance(ours, theirs) <= step.TOLERANCE


def test_without_a_peer_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(step, "disagreements", lambda *_: {})
    assert not step.agree(REHEARSAL, "cpu", 1)


def wrong_advantage(trainer):
    balance = trainer.balance

    def wrong(groups, step):
        groups[0].advantage[0] *= 1.01
        return balance(groups, step)

    trainer.balance = wrong


def wrong_beta(trainer):
    """No KL, no difference: the first step does not see it."""
    objective = trainer.session.engine.module
    objective.spec = replace(objective.spec, beta=0.05)


@pytest.mark.parametrize("plant", [wrong_advantage, wrong_beta])
def test_a_wrong_result_reports_nothing(plant, monkeypatch, results, capsys):
    from bench import _ours

    class Wrong(_ours.Ours):
        def __init__(self, *given):
            super().__init__(*given)
            plant(self.trainer)

    monkeypatch.setattr(_ours, "Ours", Wrong)
    monkeypatch.setitem(step.CONTESTANTS, "trl", "_not_there:TRL")  # one peer is enough
    threads = torch.get_num_threads()
    arguments = ["--no-tests", "--sizes", "rehearsal", "--device", "cpu", "--rounds", "1"]
    assert step.main([*arguments, "--threads", str(threads)]) == 1
    assert "no numbers" in capsys.readouterr().out
    assert not any(results.iterdir())


def test_red_tests_report_nothing(monkeypatch, results):
    monkeypatch.setattr(step, "tests_pass", lambda *_: False)
    assert step.main(["--sizes", "rehearsal", "--device", "cpu"]) == 1
    assert not any(results.iterdir())


def test_what_trls_thread_raises_reaches_the_caller(task):
    """And the thread ends."""
    pytest.importorskip("trl")
    player, _ = seat("trl", task, Clock())

    def broken(*_, **__):
        raise RuntimeError("planted")

    player.trainer.training_step = broken
    with pytest.raises(RuntimeError, match="planted"):
        player.step()
    player.close()
    player.thread.join(10)
    assert not player.thread.is_alive()


def test_trls_thread_ends_with_close(task):
    pytest.importorskip("trl")
    before = threading.active_count()
    player, _ = seat("trl", task, Clock())
    player.step()
    assert player.trainer.state.global_step == 1
    player.step()
    assert player.trainer.state.global_step == 2
    player.close()
    assert not player.thread.is_alive() and threading.active_count() <= before + 1


def test_given_completions_are_whole_and_differ():
    answers = given_completions(REHEARSAL)
    assert [[len(ids) for ids in group] for group in answers] == [[4, 4], [4, 4]]
    assert len({ids for group in answers for ids in group}) == 4
