"""The training loop, the same for GRPO and SFT: evaluate, run the steps, log, save, evaluate again.

A request to stop (`session.stop`) cancels the rollout that is running. The step then returns to
`Session.check_stop_requested`, which raises Stopped on all ranks before anything has changed; `run` saves and raises
it again with the command that resumes the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from tqdm import tqdm

from vtfast.data.batches import batches
from vtfast.data.prompt_builder import EncodedSample
from vtfast.distributed import watchdog
from vtfast.evaluate.held_out import HeldOutScores, evaluate_held_out
from vtfast.report import held_out_table, save_held_out, write_report
from vtfast.report.tracking import Tracker
from vtfast.training.checkpoint.logs import completed_step, mark_completed
from vtfast.training.setup import Session
from vtfast.utils.errors import SharedError, Stopped
from vtfast.utils.terminal import show

log = logging.getLogger("vtfast")


class StepResult(NamedTuple):
    """What an optimizer step gives to the loop."""

    metrics: dict[str, float | None]
    """Over all ranks; keys of `training.metrics.METRICS`."""
    completions: list[dict]
    """Rows of completions.jsonl, of all ranks."""


class TrainerProtocol(Protocol):
    """Interface of a trainer."""

    session: Session
    method: str
    """Name on the progress bar."""

    def step(self, step: int, batch: list[EncodedSample] | None) -> StepResult:
        """One optimizer step. Collective. `batch`: of this rank; None if the step uses the batch of the step before."""

    def summary(self, metrics: Mapping[str, float | None]) -> str:
        """The numbers beside the progress bar."""

    def draw_curves(self, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
        """Write curves.png of the run folder."""

    def completion_for_rewards(self, completion: str) -> str:
        """A held-out completion in the form that the rewards expect."""


def run(trainer: TrainerProtocol) -> Path:
    """Train up to `max_steps`, with held-out evaluations before and after; returns the run folder.

    Raises Stopped when a signal ended the run early, after saving."""
    session = trainer.session
    config, ranks, folder = session.config, session.ranks, session.folder
    if completed_step(folder) >= session.max_steps:
        log.info("%s: already complete (%d steps)", folder, session.step)
        watchdog.stop()
        return folder
    log.info(
        "%s: %d training samples (%d held out), %d prompts a step, %d steps%s, %d rank(s) on %s",
        folder,
        len(session.train_samples),
        len(session.held_out_samples),
        session.prompts_per_step,
        session.max_steps,
        f" of which {session.step} are done" if session.step else "",
        ranks.size,
        ranks.device.type,
    )
    with session.stop.listening():
        if session.step == 0:
            session.held_out_before = evaluate(trainer)
        tracker = Tracker(config, folder, session.step, session.tracker_ids) if ranks.is_main else None
        session.rollout_engine.should_cancel = lambda: session.stop.received
        try:
            train(trainer, tracker)
        except Stopped as stopped:
            raise Stopped(save_after_stop(session, tracker, stopped)) from None
        except BaseException as error:
            with watchdog.no_progress_expected("saving"):
                session.checkpointer.finish(error)
            raise
        finally:
            session.rollout_engine.should_cancel = None
    if tracker:
        tracker.close()
    before, after = session.held_out_before, evaluate(trainer)
    watchdog.stop()
    if ranks.is_main:
        trainer.draw_curves(before, after)
        if before and after:
            save_held_out(folder, before, after)
            show(held_out_table(before, after))
        write_report([folder])
    session.checkpointer.require_saved(session.step)
    if ranks.is_main:
        mark_completed(folder, session.step)
        log.info("run folder: %s", folder)
    return folder


def train(trainer: TrainerProtocol, tracker: Tracker | None) -> None:
    """The steps that are left. `tracker`: on rank 0. Raises Stopped on all ranks when any of them was asked to stop."""
    session = trainer.session
    steps = range(session.step + 1, session.max_steps + 1)
    bar = tqdm(
        steps,
        desc=trainer.method,
        unit="step",
        initial=session.step,
        total=session.max_steps,
        disable=not session.ranks.is_main,
    )
    upcoming = batches_of(session, steps)
    for step in bar:
        watchdog.beat("data", step)
        start = time.perf_counter()
        batch = next(upcoming) if session.starts_new_batch(step) else None
        waited = time.perf_counter() - start
        if batch is not None:
            session.check_stop_requested()
        result = trainer.step(step, batch)
        result.metrics["time/data"] = waited
        session.step = step
        log_step(session, tracker, result)
        bar.set_postfix_str(trainer.summary(result.metrics))
        session.checkpointer.poll()
        if save_is_due(session, step):
            save(session, tracker)
    with watchdog.no_progress_expected("saving"):
        session.checkpointer.poll(wait=True)
    session.check_stop_requested()


def batches_of(session: Session, steps: range) -> Iterator[list[EncodedSample]]:
    """This rank's batch for each of `steps` that starts a new one."""
    return batches(
        session.prompt_builder,
        session.skip_log,
        session.train_samples,
        [step for step in steps if session.starts_new_batch(step)],
        per_rank=session.config.prompts_per_rank,
        rank=session.ranks.rank,
        ranks=session.ranks.size,
        seed=session.config.seed,
        steps_per_batch=session.steps_per_batch,
    )


def evaluate(trainer: TrainerProtocol) -> HeldOutScores | None:
    """Accuracy and format on the held-out samples; None if there are none. Collective."""
    session = trainer.session
    if not session.held_out_samples:
        return None
    watchdog.beat("held-out samples")
    return evaluate_held_out(
        session.rollout_engine,
        session.prompt_builder,
        session.held_out_samples,
        session.config,
        session.ranks,
        to_reward_text=trainer.completion_for_rewards,
    )


def log_step(session: Session, tracker: Tracker | None, result: StepResult) -> None:
    """Write the step to the logs. Collective: a full disk on rank 0 stops all ranks, unless `--on_save_error
    continue`."""
    if tracker:
        tracker.log(session.step, result.metrics, result.completions)
    problem = session.ranks.from_main(tracker.problem if tracker else None)
    if problem and session.config.on_save_error == "stop":
        raise SharedError(f"step {session.step}: {problem}; make room and resume with --resume_from_checkpoint last")
    if problem and session.ranks.is_main:
        log.warning("step %d: %s; the run continues (--on_save_error continue)", session.step, problem)


def save_is_due(session: Session, step: int) -> bool:
    """After the last step; and with `--save_steps` N at the first resumable step after each multiple of N."""
    every, batch = session.config.save_steps, session.steps_per_batch
    if step == session.max_steps:
        return True
    return bool(every) and session.starts_new_batch(step + 1) and step // every > (step - batch) // every


def save(session: Session, tracker: Tracker | None) -> None:
    """Write a checkpoint of the steps done so far, or start to in the background. Collective."""
    session.checkpointer.save(session.step, session.held_out_before, tracker)


@watchdog.no_progress_expected("saving")
def save_after_stop(session: Session, tracker: Tracker | None, stopped: Stopped) -> str:
    """Save the steps done so far; the message that says how to resume. Collective."""
    saver = session.checkpointer
    saver.poll(wait=True)
    if session.step and session.step != saver.last:
        save(session, tracker)
        saver.poll(wait=True)
    if tracker:
        tracker.close()
    unsaved = "" if saver.last == (session.step or None) else f" ({saver.last_saved})"
    resume = f"--resume_from_checkpoint last --output_dir {session.folder}"
    return f"stopped by {stopped} after step {session.step}{unsaved}; resume with {resume}"
