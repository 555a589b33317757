"""The watchdog: which rank is blamed, in which words, and that no rank is left behind.

The monitor is tested with a clock of the test's own, the threads and the store with small real processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from vtfast.cli.main import BAD_INPUT
from vtfast.distributed import init, watchdog
from vtfast.distributed.watchdog.monitor import RANK_LOST, Failure, Member, Monitor, Report
from vtfast.utils.errors import RankError

MEMBERS = [Member(0, "a", 10), Member(1, "b", 4242), Member(2, "b", 4243)]


def monitor(limit=600.0):
    return Monitor(MEMBERS, limit)


def working(beats, step=17, phase="rollout", **more):
    return Report(step=step, phase=phase, beats=beats, idle=False, **more)


def after(monitor, seconds, *states):
    """`seconds` later these ranks report again; None is one that does not."""
    monitor.now += seconds
    for rank, state in enumerate(states):
        if state is not None:
            monitor.record(rank, state)
    return monitor.overdue()


def test_a_rank_without_progress_is_named_with_place_and_time():
    table = monitor()
    assert after(table, 5, working(1), working(1, where="vtfast/x.py:3 in wait"), working(1)) is None
    for beat in range(2, 62):
        stuck = working(1, where="vtfast/x.py:3 in wait")
        assert after(table, 10, working(beat), stuck, working(beat)) is None
    failure = after(table, 11, working(99), working(1, where="vtfast/x.py:3 in wait"), working(99))
    assert (failure.rank, failure.exit_code, failure.reported) == (1, RANK_LOST, False)
    assert failure.message == (
        "rank 1 (host b, pid 4242) has been in step 17, rollout for 611 s without progress (--rank_timeout 600),"
        " at vtfast/x.py:3 in wait"
    )


def test_only_the_rank_that_others_wait_for_is_to_blame():
    table = monitor()
    waiting = working(7, waiting=True)
    after(table, 1, waiting, working(3), waiting)
    assert after(table, 601, waiting, working(3), waiting).rank == 1
    everyone = monitor()
    after(everyone, 1, waiting, waiting, waiting)
    assert after(everyone, 9999, waiting, waiting, waiting) is None  # the collective's own timeout ends that


def test_the_time_begins_when_a_wait_or_an_idle_phase_is_over():
    for before in (working(7, waiting=True), Report(step=17, phase="saving", beats=7)):
        table = monitor()
        after(table, 1, working(1), before, working(1))
        after(table, 5000, working(2), before, working(2))
        assert after(table, 599, working(3), working(7, before.step, before.phase), working(3)) is None
        assert after(table, 599, working(4), working(7, before.step, before.phase), working(4)) is None
        assert after(table, 2, working(5), working(7, before.step, before.phase), working(5)).rank == 1


def test_start_up_may_take_its_time():
    table = monitor()
    assert after(table, 100, Report(), Report(), Report()) is None
    assert after(table, 5000, Report(), Report(), Report()) is None


def test_those_that_stand_still_are_named_in_the_order_in_which_they_stopped():
    """A rank blocked in DeepSpeed's collective does not say that it waits."""
    table = monitor()
    after(table, 1, working(1), working(1), working(1))
    after(table, 100, working(2), working(1), working(2, waiting=True))
    failure = after(table, 501, working(2), working(1), working(2, waiting=True))
    assert failure.rank == 1 and failure.message.index("rank 1 (") < failure.message.index("rank 0 (")
    assert "rank 2" not in failure.message


def test_a_silent_rank_comes_before_those_that_only_wait_for_it():
    table = monitor()
    after(table, 1, working(1), working(1), working(1))
    after(table, 10, working(1), working(2), working(1))
    failure = after(table, 601, working(1), None, working(1))
    assert failure.message == (
        "rank 1 (host b, pid 4242) has not been heard for 601 s (--rank_timeout 600); it was in step 17, rollout"
    )


def test_a_dead_rank():
    table = monitor()
    after(table, 1, working(1), working(1), working(1))
    table.now += 12
    died = table.died(1)
    assert died.message == "rank 1 (host b, pid 4242) died; last heard 12 s ago in step 17, rollout"
    assert not died.reported
    reason = Failure(1, "rank 1 (host b, pid 4242) failed in step 17, rollout: KeyError: x", RANK_LOST, reported=True)
    after(table, 1, None, working(2, failure=reason), None)
    assert table.died(1) == reason


def test_a_rank_that_has_stopped_watching_is_not_monitored():
    table = monitor()
    after(table, 1, working(1), working(1, stopped=True), working(1))
    assert after(table, 9999, working(2), None, working(2)) is None


RANK = """
import sys, os, json, time, socket
import torch.distributed as dist
from vtfast.distributed import watchdog
from vtfast.cli.main import BAD_INPUT
rank, size, limit, host = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[5]
socket.gethostname = lambda: host
def tell(value):
    print(json.dumps(value), flush=True)
server = None if rank else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
tell([os.getpid(), server and server.port])
pids, port = json.loads(sys.stdin.readline())
store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
watchdog.start_watchdog(store, rank, size, limit)
watchdog.beat("rollout", 17)
tell("started")
sys.stdin.readline()
exec(sys.argv[4])
"""
WORK = "\nwhile True:\n    watchdog.beat(); time.sleep(0.02)"
WAIT = "\nwith watchdog.waiting():\n    time.sleep(60)"


class Party:
    """Small processes that are ranks and have nothing but a watchdog. `scripts`: what each does once all started."""

    def __init__(self, *scripts: str, limit: float = 60.0, hosts: str = "aaaa") -> None:
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(len(scripts)), str(limit), script, hosts[rank]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"},  # as the command line sets it
            )
            for rank, script in enumerate(scripts)
        ]
        said = [json.loads(rank.stdout.readline()) for rank in self.ranks]
        pids = [pid for pid, _ in said]
        for order in (json.dumps([pids, said[0][1]]), ""):
            for rank in self.ranks:
                rank.stdin.write(order + "\n")
                rank.stdin.flush()
            if order:
                assert all(rank.stdout.readline() for rank in self.ranks)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()

    def settle(self, seconds: float = 1.5) -> None:
        """Long enough for every rank to have reported."""
        time.sleep(seconds)

    def died(self, rank: int) -> str:
        return f"error: rank {rank} (host a, pid {self.ranks[rank].pid}) died; last heard"

    def ends(self, *without: int) -> list[tuple[int, str]]:
        """(exit code, last words) of every rank but those `without` an end."""
        ends = []
        for number, rank in enumerate(self.ranks):
            if number not in without:
                words = rank.communicate(timeout=30)[1]
                ends.append((rank.returncode, words.strip()))
        return ends


def test_a_killed_rank_ends_the_others_at_once():
    with Party(WAIT, WORK, WAIT, WAIT, hosts="aabb") as party:
        party.settle()
        party.ranks[1].kill()
        (zero, words), (two, elsewhere), (three, silent) = party.ends(1)
        assert zero == two == three == RANK_LOST
        assert party.died(1) in words and "step 17, rollout" in words
        assert elsewhere == words and silent == ""  # one voice a machine


def test_a_rank_is_named_in_the_phase_that_it_died_in():
    """Which began after its last regular report."""
    dies = "time.sleep(1.3)\nwatchdog.beat('update', 18)\ntime.sleep(0.3)\nos.kill(os.getpid(), 9)"
    with Party(WAIT, dies) as party:
        ((_, words),) = party.ends(1)
        assert words.endswith("in step 18, update")


def test_rank_0_may_be_the_one_that_dies():
    with Party(WORK, WAIT, WAIT) as party:
        party.settle()
        party.ranks[0].kill()
        (one, words), (two, silent) = party.ends(0)
        assert one == two == RANK_LOST and silent == ""
        assert party.died(0) in words and "step 17, rollout" in words


@pytest.mark.parametrize("hung", [0, 1])
def test_a_stopped_process_is_noticed(hung):
    scripts = [WAIT, WAIT]
    scripts[hung] = WORK
    with Party(*scripts, limit=2.0) as party:
        party.settle(1.0)
        os.kill(party.ranks[hung].pid, signal.SIGSTOP)
        ((code, words),) = party.ends(hung)
        assert code == RANK_LOST
        assert f"rank {hung} (host a" in words and "has not been heard for" in words
        assert "(--rank_timeout 2)" in words and "in step 17, rollout" in words


@pytest.mark.parametrize("hung", [0, 1])
def test_a_main_thread_that_hangs_ends_all_and_itself(hung):
    scripts = [WAIT, WAIT]
    scripts[hung] = "time.sleep(60)"
    with Party(*scripts, limit=2.0) as party:
        ends = party.ends()
        assert [code for code, _ in ends] == [RANK_LOST, RANK_LOST]
        words = ends[1 - hung][1]
        assert f"rank {hung} (host a" in words and "has been in step 17, rollout for 2 s" in words
        assert ends[hung][1] == ""


def test_ranks_that_get_on_are_left_alone():
    """For longer than the limit, waiting and saving included; then they leave one after the other."""
    busy = "for _ in range(150):\n    watchdog.beat(); time.sleep(0.02)"
    wait = "with watchdog.waiting():\n    time.sleep(3)"
    save = "with watchdog.no_progress_expected('saving'):\n    time.sleep(3.5)"
    with Party(busy, wait, save, limit=1.5) as party:
        assert party.ends() == [(0, ""), (0, ""), (0, "")]


FAIL = """
try:
    raise MemoryError('CUDA out of memory')
except MemoryError as error:
    watchdog.fail(f'{type(error).__name__}: {error}', watchdog.RANK_LOST)
    raise
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_rank_tells_the_others_why(failing):
    scripts = [WAIT, WAIT, WAIT]
    scripts[failing] = FAIL
    with Party(*scripts, hosts="abb") as party:
        ends = party.ends()
        assert [code for code, _ in ends] == [1 if r == failing else RANK_LOST for r in range(3)]
        assert "Traceback" in ends[failing][1]
        line = f"error: rank {failing} (host {'abb'[failing]}, pid {party.ranks[failing].pid}) failed in step 17,"
        assert ends[2][1] == "", "one voice a machine, and a traceback is one"
        assert ends[1 - failing][1] == f"{line} rollout: MemoryError: CUDA out of memory"


def test_rank_0_has_told_its_failure_when_another_rank_ends():
    """A launcher then kills it."""
    with Party(FAIL, WAIT) as party:
        party.ranks[1].wait(timeout=30)
        party.ranks[0].kill()
        (zero, words), (one, _) = party.ends()
        assert one == RANK_LOST and zero == -signal.SIGKILL
        assert "MemoryError: CUDA out of memory" in words


def test_an_exception_that_follows_from_a_death_gives_way_to_it():
    """gloo's complaint about a closed connection is not what the user has to read."""
    echo = "while os.path.exists(f'/proc/{pids[2]}/fd'):\n    time.sleep(0.001)\n" + FAIL
    with Party(echo, echo, WORK) as party:
        party.settle()
        party.ranks[2].kill()
        party.ranks[2].wait()
        (zero, words), (one, silent) = party.ends(2)
        assert zero == one == RANK_LOST and silent == ""
        assert "rank 2" in words and "died" in words and "Traceback" not in words


def test_a_reason_outlives_its_rank():
    """The launcher may kill the failing rank before rank 0 has made up its mind."""
    fails = (
        "import threading\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), 9)).start()\n"
        "watchdog.fail('KeyError: x', watchdog.RANK_LOST)"
    )
    with Party(WAIT, fails) as party:
        ((code, words),) = party.ends(1)
        assert code == RANK_LOST and words.endswith("failed in step 17, rollout: KeyError: x")


def test_bad_input_that_all_ranks_find_is_said_in_their_own_words():
    """Though one of them finds it a second later."""
    bad = "watchdog.fail('step 1, row 3: planted', BAD_INPUT); sys.exit(BAD_INPUT)"
    with Party(f"time.sleep(1.3); {bad}", bad, bad) as party:
        assert party.ends() == [(2, "")] * 3


def test_bad_input_of_one_rank_is_told_by_the_others():
    bad = "watchdog.fail('data.parquet: not there', BAD_INPUT); sys.exit(BAD_INPUT)"
    with Party(WAIT, bad) as party:
        (zero, words), (one, silent) = party.ends()
        assert zero == one == 2 and silent == ""
        assert words.endswith("failed in step 17, rollout: data.parquet: not there")


def test_a_rank_that_fails_is_told_whether_the_others_have_heard():
    asks = "heard = watchdog.fail('full', BAD_INPUT); print(heard, file=sys.stderr); sys.exit(2)"
    with Party(WAIT, asks) as party:
        assert party.ends()[1] == (2, "True")
    assert watchdog.fail("full", BAD_INPUT) is False, "one rank alone"


@pytest.mark.parametrize(("heard", "said"), [(False, "error: a full disk (rank 1)\n"), (True, "")])
def test_what_one_rank_meets_is_said_once_a_machine(heard, said, monkeypatch, capsys):
    """By its first rank where that has heard of it, or else by the rank itself."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(watchdog, "fail", lambda reason, code: heard)
    assert sys.modules["vtfast.cli.main"]._report(RankError("a full disk")) == BAD_INPUT
    assert capsys.readouterr().err == said


def test_an_uncaught_exception_is_no_way_to_leave():
    with Party(WAIT, "raise KeyError('x')") as party:
        (zero, words), (one, _) = party.ends()
        assert (zero, one) == (RANK_LOST, 1) and "rank 1" in words and "died" in words


def test_a_suspended_job_goes_on():
    """All ranks stopped for longer than the limit, as schedulers do: nobody was watching, nobody is late."""
    busy = "for _ in range(200):\n    watchdog.beat(); time.sleep(0.02)"
    with Party(busy, busy, limit=2.0) as party:
        party.settle(0.5)
        for sent in (signal.SIGSTOP, signal.SIGCONT):
            for rank in party.ranks:
                os.kill(rank.pid, sent)
            time.sleep(3.0)
        assert party.ends() == [(0, ""), (0, "")]


@pytest.mark.parametrize("failed", [False, True])
def test_a_rank_that_failed_does_not_wait_for_collectives(monkeypatch, failed):
    """Destroying NCCL's group waits for work that the other ranks will never join."""
    left = []
    monkeypatch.setattr(init.dist, "destroy_process_group", lambda: left.append(1))
    monkeypatch.setattr(watchdog, "_thread", SimpleNamespace(failed=failed))
    init._leave_process_group()
    assert left == ([] if failed else [1])
    monkeypatch.setattr(watchdog, "_thread", None)
    monkeypatch.setattr(sys, "last_value", KeyError("x"), raising=False)
    init._leave_process_group()
    assert left == ([] if failed else [1])
