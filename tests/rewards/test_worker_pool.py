"""Rewards in processes: what fails costs its own score and nothing else."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from make_files import encoded, picture, sat_row, write_sat
from steps import scored

from vtfast.config import load_config
from vtfast.data import Sample
from vtfast.data.batches import batches
from vtfast.data.images import Images
from vtfast.rewards import RewardInput
from vtfast.rewards.manager import RewardManager
from vtfast.trainer import Trainer
from vtfast.utils.errors import UserError

MODULE = """
import os, sys, time

def number(completion, sample): return int(completion)
def raises(completion, sample): raise ValueError("first line\\nsecond line")
def nan(completion, sample): return float("nan")
def text(completion, sample): return "1.0"
def nothing(completion, sample): pass
def leaves(completion, sample): sys.exit("bye")
def dies(completion, sample): os._exit(3)
def crashes(completion, sample): os.kill(os.getpid(), 11)
def hangs(completion, sample): return 9**9**9**9
def wrong_parameters(completion): return 1.0

def mixed(completion, sample):
    number = int(completion)
    if number % 5 == 1: raise ValueError(completion)
    if number % 5 == 2: os._exit(1)
    if number % 10 == 3: time.sleep(60)
    time.sleep(0.01 * (7 * number % 3))
    return number

def process(completion, sample): return os.getpid()
def environment(completion, sample): return float(os.environ["MINE"])
def has_torch(completion, sample): return "torch" in sys.modules
def has_sympy(completion, sample): return "sympy" in sys.modules
def width(completion, sample): return sum(image.width for image in sample.images)
def row(completion, sample): return sample.row + len(sample.options) + len(sample.answer)
def tokens(completion, sample, tokens): return tokens
def prefix(completion, sample, *, prefix="none"): return len(prefix)
def anything(completion, sample, **options): return options["tokens"] + len(options["prefix"])
"""
SAMPLE = Sample("?", ["left", "right"], "left", Images([encoded(picture(40, 30))]), row=7)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def make():
    """A scorer with two workers; its processes end with the test."""
    made = []

    def build(*functions, workers=2, timeout=30.0, **settings):
        names = [name if name in ("accuracy", "format") else f"mine:{name}" for name in functions]
        made.append(RewardManager(names, workers=workers, timeout=timeout, **settings))
        return made[-1]

    yield build
    for scorer in made:
        scorer.close()


def responses(*texts, sample=SAMPLE):
    return [RewardInput(str(text), sample, tokens=11, prefix="<think>") for text in texts]


FAILURES = {
    "raises": "ValueError: first line",
    "nan": "returned nan and not a finite number",
    "text": "returned '1.0' and not a finite number",
    "nothing": "returned None and not a finite number",
    "leaves": "SystemExit: bye",
    "wrong_parameters": "TypeError: wrong_parameters() takes 1 positional argument but 2 were given",
}
KILLED = {
    "dies": "its process ended (exit code 3)",
    "crashes": "its process ended (SIGSEGV)",
    "hangs": "no score within 1.5 s (--reward_timeout)",
}


def test_what_goes_wrong_scores_0_and_says_why(make):
    scorer = make(*FAILURES, *KILLED, "number", timeout=1.5)
    *bad, good = scorer.score(responses("5"))
    assert [score.failure for (score,) in bad] == [*FAILURES.values(), *KILLED.values()]
    assert all(score.value == 0.0 for (score,) in bad)
    assert (good[0].value, good[0].failure) == (5.0, None)


def test_without_workers_too(make):
    for (score,), reason in zip(make(*FAILURES, workers=0).score(responses("5")), FAILURES.values(), strict=True):
        assert (score.value, score.failure) == (0.0, reason)


def test_jobs_behind_a_hung_one_are_not_lost(make):
    scorer = make("mixed", workers=1, timeout=1.5)
    (scores,) = scorer.score(responses(*range(3, 20)))
    assert [score.value for score in scores] == [
        number if number % 5 not in (1, 2) and number % 10 != 3 else 0.0 for number in range(3, 20)
    ]
    assert scores[0].failure == KILLED["hangs"] and scores[3].failure == "ValueError: 6"
    (again,) = scorer.score(responses(4, 5))
    assert [score.value for score in again] == [4, 5], "the pool goes on working"


def test_scores_do_not_depend_on_the_number_of_workers(make):
    texts = [number for number in range(30) if number % 5 not in (2, 3)]  # in this process too
    tables = [make("mixed", "number", "accuracy", workers=workers).score(responses(*texts)) for workers in (0, 1, 2, 5)]
    assert [score.value for score in tables[0][1]] == texts
    assert tables[0] == tables[1] == tables[2] == tables[3]


def test_a_job_is_timed_from_when_a_worker_has_it(make, module):
    (module / "slow.py").write_text("import time; time.sleep(1.2)\ndef one(c, s): return 1")
    scorer = RewardManager(["slow:one"], workers=1, timeout=0.5)
    assert [score.value for score in scorer.score(responses(*range(3)))[0]] == [1, 1, 1]
    scorer.close()


def test_as_many_processes_as_needed_and_the_same_ones_again(make):
    scorer = make("process", workers=3)
    assert len({score.value for score in scorer.score(responses("a"))[0]}) == 1
    # Which of the three gets how many jobs is chance; a fourth would be a new one.
    rounds = [scorer.score(responses(*range(30)))[0] for _ in range(4)]
    processes = {score.value for scores in rounds for score in scores}
    assert len(processes) <= 3 and os.getpid() not in processes
    assert len(scorer.pool.workers) == 3


def test_a_worker_that_dies_between_steps_costs_nothing(make):
    scorer = make("process", workers=2)
    scorer.score(responses(*range(4)))
    for worker in scorer.pool.workers:  # one of them may not even have started yet
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    (scores,) = scorer.score(responses(*range(4)))
    assert not any(score.failure for score in scores)


def test_a_worker_that_cannot_start_ends_the_work_and_not_the_run(module):
    (module / "here_only.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: os._exit(9)\ndef one(c, s): return 1"
    )
    scorer = RewardManager(["here_only:one"], workers=2, timeout=5)
    (scores,) = scorer.score(responses(*range(3)))
    assert {score.failure for score in scores} == {"no worker started: its process ended (exit code 9)"}
    assert [score.failure for score in scorer.score(responses(1))[0]] == [scores[0].failure]
    (module / "picky.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise KeyError('x')\ndef one(c, s): return 1"
    )
    scorer = RewardManager(["picky:one", "mine:number"], workers=1, timeout=5)
    (picky,), (number,) = scorer.score(responses("4"))
    assert "cannot load the reward 'picky:one': KeyError" in picky.failure and number.value == 4
    scorer.close()


def test_what_a_function_gets(make, monkeypatch):
    monkeypatch.setenv("MINE", "5")
    names = ("tokens", "prefix", "anything", "row", "width", "environment", "has_torch")
    for workers in (0, 2):
        values = [score.value for (score,) in make(*names, workers=workers).score(responses("x"))]
        assert values[:6] == [11, 7, 18, 7 + 2 + 4, 40, 5]
        assert workers == 0 or values[6] == 0, "a worker must not import torch"


def test_math_verify_is_loaded_before_the_clock_starts_and_only_if_needed(make):
    assert make("has_sympy", "accuracy").score(responses("x"))[0][0].value == 1
    assert make("has_sympy", "format").score(responses("x"))[0][0].value == 0


def test_images_go_to_user_functions_alone(make):
    unsendable = Sample("?", [], "3", [lambda: None])
    scorer = make("accuracy", "number")
    accuracy, number = scorer.score(responses("<answer>3.0</answer>", sample=unsendable))
    assert accuracy[0].value == 1.0 and "pickle" in number[0].failure


def test_what_is_quick_and_harmless_starts_no_process(make):
    scorer = make("accuracy", "format")
    (right,), (form,) = scorer.score(responses("</think><answer>left</answer>"))
    assert (right.value, form.value) == (1.0, 1.0) and scorer.pool.workers == []
    scorer.score(responses("<answer>3</answer>", sample=Sample("?", [], "a text", [])))
    assert scorer.pool.workers == []
    scorer.score(responses("<answer>3</answer>", sample=Sample("?", [], "3", [])))
    assert len(scorer.pool.workers) == 1, "an open question with a number for an answer"
    parity = make("accuracy", "format", mode="recipe")
    parity.score(responses("left"))
    assert parity.pool.workers == []
    (right,), _ = parity.score(responses("left 30", sample=Sample("?", ["a"], "by 30", [])))
    assert right.value == 1.0 and len(parity.pool.workers) == 1


def test_nothing_to_score(make):
    assert make("number", "format").score([]) == [[], []]


def test_a_reward_that_fails_everywhere_is_named(make, caplog):
    with caplog.at_level(logging.WARNING, "vtfast"):
        make("raises", "mixed", "number").score(responses(1, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "--reward_funcs mine:raises: failed for all 2 completions, which count as 0: ValueError: first line"
    ]


def test_an_unknown_reward_is_named_at_once():
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        RewardManager(["acuracy"])
    with pytest.raises(UserError, match="no_such_module"):
        RewardManager(["no_such_module:x"], workers=2)


# Without `if __name__ == "__main__"`: a worker must not run the script again.
SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
from vtfast.rewards import RewardInput
from vtfast.rewards.manager import RewardManager
from vtfast.data import Sample
print("start", flush=True)
sample = Sample("?", [], "x", [])
scorer = RewardManager(["mine:process", "mine:hangs"][:{rewards}], workers=2, timeout={timeout})
pids = scorer.score([RewardInput("", sample, 1)] * 8)[0]
print(*sorted({{int(score.value) for score in pids}}), flush=True)
{end}
"""


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends (a zombie counts: its parent may not be there to collect it)."""
    for _ in range(int(seconds / 0.05)):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0", "import os; os.kill(os.getpid(), 9)"])
def test_workers_end_with_the_trainer(module, end):
    script = SCRIPT.format(folder=str(module), rewards=1, timeout=5, end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    start, pids = done.stdout.splitlines()
    assert start == "start" and pids
    assert all(gone(int(pid), 5) for pid in pids.split())
    assert "1 / 0" not in end or "ZeroDivisionError" in done.stderr


def test_a_hung_worker_without_a_trainer_ends_by_itself(module):
    (module / "pid.py").write_text(
        "import os, pathlib, time\n"
        "def hangs(completion, sample):\n"
        f"    pathlib.Path({str(module)!r}, 'pid').write_text(str(os.getpid()))\n"
        "    return 9**9**9**9\n"
    )
    script = SCRIPT.format(folder=str(module), rewards=1, timeout=1, end="")
    trainer = subprocess.Popen([sys.executable, "-c", script.replace("mine:process", "pid:hangs")])
    while not (module / "pid").exists() or not (module / "pid").read_text():
        time.sleep(0.02)
    trainer.kill()
    trainer.wait()
    assert gone(int((module / "pid").read_text()), 10)


def test_a_worker_that_has_not_started_ends_with_the_trainer_too(module):
    (module / "slow.py").write_text(
        "import os, pathlib, time\n"
        "first = pathlib.Path(__file__).with_name('first')\n"
        "if first.exists(): time.sleep(60)\n"
        "def process(completion, sample): first.touch(); return os.getpid()\n"
    )
    end = "print(*(worker.process.pid for worker in scorer.pool.workers))"
    script = SCRIPT.format(folder=str(module), rewards=1, timeout=5, end=end)
    script = script.replace("mine:process", "slow:process").replace(
        "pids =", 'scorer.score([RewardInput("", sample, 1)])\npids ='
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    started, both = (set(line.split()) for line in done.stdout.splitlines()[1:])
    assert len(started) == 1 and len(both) == 2
    assert all(gone(int(pid), 5) for pid in both)


def test_what_a_hung_reward_started_is_killed_with_it(make, module):
    (module / "parent.py").write_text(
        "import pathlib, subprocess\n"
        "def hangs(completion, sample):\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    pathlib.Path(completion).write_text(str(child.pid))\n"
        "    child.wait()\n"
    )
    scorer = RewardManager(["parent:hangs"], workers=1, timeout=1.5)
    ((score,),) = scorer.score(responses(module / "pid"))
    assert score.failure == KILLED["hangs"]
    assert gone(int((module / "pid").read_text()), 5)


@pytest.fixture
def trainer(tmp_path):
    def build(**overrides):
        rows = [sat_row(seed) for seed in range(6)]
        data = str(write_sat(tmp_path / "train.parquet", rows))
        settings = {
            "data": data,
            "eval_data": None,
            "max_steps": 1,
            "max_completion_length": 12,
            "num_generations": 4,
            "per_device_train_batch_size": 3,
            "output_dir": str(tmp_path / "run"),
        }
        return Trainer(load_config(overrides=settings | overrides))

    return build


def test_failures_are_counted_and_told_with_their_completions(trainer, module, caplog):
    (module / "unlucky.py").write_text(
        "def odd(completion, sample):\n    if len(completion) % 2: raise ValueError(len(completion))\n    return 0.25\n"
    )
    run = trainer(reward_funcs="length,unlucky:odd,mine:dies", reward_weights="1,1,2", temperature=3.0)
    with caplog.at_level(logging.WARNING, "vtfast"):
        folder = run.run()
    assert run.scorer.pool.workers == []
    (metrics,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    odd = [len(row["completion"]) % 2 == 1 for row in rows]
    assert len(rows) == 12 and 0 < sum(odd) < 12
    for row, failed in zip(rows, odd, strict=True):
        expected = {"mine:dies": KILLED["dies"]}
        if failed:
            expected["unlucky:odd"] = f"ValueError: {len(row['completion'])}"
        assert row["failed"] == expected
        assert row["rewards"]["unlucky:odd"] == (0.0 if failed else 0.25)
        assert row["reward"] == pytest.approx(0.001 * row["length"] + (0.0 if failed else 0.25))
    assert metrics["rewards/failed"] == 12 + sum(odd)
    assert metrics["rewards/unlucky:odd"] == pytest.approx(0.25 * (12 - sum(odd)) / 12)
    assert "mine:dies: failed for all 12 completions" in caplog.text
    assert "unlucky:odd: failed" not in caplog.text


@pytest.mark.parametrize(("template", "form"), [("brief", 1.0), ("instruct", 0.0)])
def test_the_recipe_mode_knows_what_the_prompt_wrote(trainer, monkeypatch, template, form):
    """The same tokens: behind `<think>` they are the format, behind nothing they are not."""
    run = trainer(reward_mode="recipe", template=template, reward_funcs="format,accuracy")
    (questions,) = batches(run.session.prompt_builder, run.session.skip_log, run.session.train_samples, [1], per_rank=2)
    for text, expected in [("so.</think><answer>x</answer>", (form, 0.0)), ("3", (0.0, 1.0))]:
        monkeypatch.setattr(run.session.processor, "decode", lambda tokens, text=text: text)
        for group in scored(run, questions):
            assert group.rewards.equal(torch.tensor([[value] * 4 for value in expected]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"reward_mode": "lenient"}, "--reward_mode lenient: must be one of strict, recipe"),
        ({"reward_timeout": 0}, "--reward_timeout 0.0: must be above 0"),
        ({"reward_workers": -1}, "--reward_workers -1: must not be negative"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=setting)
