"""A run that is asked to stop ends between two steps, saved."""

import os
import signal

import pytest
from whole_runs import assert_same_run, build, run, steps

from vtfast.training.stopping import StopNotice
from vtfast.utils.errors import Stopped


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))]
)
def test_a_signal_in_the_rollout_gives_it_up_and_saves(number, tmp_path, questions):
    """Nothing of the step in hand is kept, and the whole run's numbers follow when it is resumed."""
    settings = questions | {"eval_data": "none", "save_steps": 0}
    run(tmp_path / "whole", **settings)
    trainer = build(output_dir=str(tmp_path / "run"), **settings)
    begin, calls = trainer.session.rollout_engine.start, []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return begin(*arguments)

    trainer.session.rollout_engine.start = signalled
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step 2; resume with .*last --output_dir"):
        trainer.run()
    assert signal.getsignal(number) not in (trainer.session.stop._notice,), "the handlers are put back"
    assert steps(tmp_path / "run") == ["step-2"] and not trainer.session.stop.file.exists()
    run(tmp_path / "run", resume_from_checkpoint="last", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_signal_in_the_update_lets_the_step_end(tmp_path, sft):
    trainer = build(output_dir=str(tmp_path / "run"), **sft | {"save_steps": 0})
    update = trainer.update

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    trainer.update = signalled
    with pytest.raises(Stopped, match="after step 1"):
        trainer.run()
    assert steps(tmp_path / "run") == ["step-1"]


def test_two_interrupts_are_one_too_many(tmp_path):
    notice = StopNotice(tmp_path)
    with pytest.raises(KeyboardInterrupt), notice.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert notice.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_other_ranks_hear_of_a_signal(tmp_path):
    ours, theirs = StopNotice(tmp_path), StopNotice(tmp_path)
    with ours.listening():
        assert theirs.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert ours.received == "SIGTERM" and theirs.received == "a signal to another rank"
