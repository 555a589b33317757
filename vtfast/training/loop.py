"""What every kind of training shares: the start, the run folder, the loop, judging and saving.

`trainer.Trainer` (GRPO) and `sft.SFTTrainer` say what their loss is and what a step does.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vtfast.config import RunConfig
from vtfast.data import Sample
from vtfast.data.batches import batches
from vtfast.data.processor import Processor
from vtfast.data.prompt_builder import EncodedSample, PromptBuilder
from vtfast.data.splits import load_questions, render_synthetic, samples_digest
from vtfast.distributed import launch, watchdog
from vtfast.distributed.determinism import seed_all
from vtfast.distributed.zero2 import zero2_engine
from vtfast.evaluate.held_out import HeldOutScores, evaluate_held_out
from vtfast.model.adapters import add_lora
from vtfast.model.fingerprint import fingerprint
from vtfast.model.liger import use_liger
from vtfast.model.loading import load_model
from vtfast.model.packing import check_group
from vtfast.report import held_out_table, save_held_out, write_report
from vtfast.report.tracking import Tracker
from vtfast.rollout.engines import build_engine
from vtfast.training.checkpoint import Saver, find_checkpoint, keep_data, prepare_run_folder
from vtfast.training.checkpoint.logs import completed_step, flush_lists, mark_completed
from vtfast.training.checkpoint.resume import held_out_before, put_back, state_of, write_rest
from vtfast.training.gradients import drop_gradients
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.health import GuardedOptimizer, Health
from vtfast.training.load_balancing import StepBatches, share_out
from vtfast.training.stopping import StopNotice
from vtfast.training.token_budget import TokenBudget
from vtfast.utils.errors import SharedError, Stopped, UserError
from vtfast.utils.hub import model_path
from vtfast.utils.terminal import show

log = logging.getLogger("vtfast")


class Run:
    """Everything of a run. Construction raises UserError for bad input and leaves nothing behind on disk."""

    method = ""
    """Name on the progress bar."""
    steps_per_batch = 1
    """Optimizer steps that live on one set of questions."""
    skips_groups_without_signal = False
    """Whether groups whose advantages are all 0 are left out of the update."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.ranks = ranks = launch.init_distributed(config)
        seed_all(config.seed)
        checkpoint = ranks.on_main(lambda: find_checkpoint(config))

        path = model_path(config.model)
        self.processor = Processor.from_pretrained(path, config.min_pixels, config.max_pixels)
        self.asker = PromptBuilder(config, self.processor)
        self.policy = load_model(path, config.dtype, str(ranks.device), config.freeze, config.attn_implementation)
        self.base = fingerprint(self.policy.module)
        if config.use_liger_kernel and ranks.device.type == "cuda":
            use_liger(self.policy)
        if config.use_peft:
            add_lora(self.policy, config.lora_r, config.lora_alpha, config.lora_target_modules)
        self.health = Health()
        objective = self.objective()
        if config.gradient_checkpointing:
            self.policy.module.gradient_checkpointing_enable({"use_reentrant": False})

        with tempfile.TemporaryDirectory() as scratch:  # a start that fails leaves nothing behind
            rendered = render_synthetic(config, Path(scratch) / "data")
            samples = load_questions(config, self.asker, rendered)
            self.train_samples = self.trainable(samples["train"])
            self.samples_digest = samples_digest(self.train_samples)
            self.held_out_samples = samples.get("val", [])
            config.max_steps = self.max_steps()
            self.engine = zero2_engine(config, objective)
            most_images = max(len(s.images) for part in samples.values() for s in part)
            self.rollout = build_engine(config, self.policy, self.processor, path, most_images)
            if checkpoint:
                put_back(self, checkpoint)
            self.folder = ranks.on_main(lambda: prepare_run_folder(config, checkpoint))
            limit = timedelta(seconds=config.ddp_timeout)
            self.budget = TokenBudget(config.tokens_per_micro_batch, self.folder, ranks, limit)
            most = config.max_nonfinite_steps
            self.keeper = GuardedOptimizer(self.engine, ranks, self.folder, most, self.health)
            ranks.on_main(lambda: keep_data(rendered, self.folder))
        self.done = checkpoint.state.step if checkpoint else 0
        """Optimizer steps."""
        self.before = held_out_before(checkpoint.state) if checkpoint else None
        self.trackers = checkpoint.trackers(self.folder) if checkpoint else {}
        self.tracker: Tracker | None = None
        self.stop = StopNotice(self.folder)
        self.saver = Saver(
            self.folder / "checkpoints",
            ranks,
            background=config.async_save,
            keep=config.save_total_limit,
            stop_on_error=config.on_save_error == "stop",
        )
        if checkpoint:
            self.saver.mark_resumed(checkpoint.folder, self.done)
        if ranks.is_main and not checkpoint:
            self.list_skipped(self.asker.skipped)
        self.asker.skipped = []
        self.at_step = 0
        """The optimizer step that is under way; for what is written down of it."""

    # What a kind of training says of itself

    def objective(self) -> nn.Module:
        """The module that DeepSpeed trains: the arguments of a pass -> (loss, tensors that `optimize` collects).
        Called once, when `policy` is as it will be trained."""
        raise NotImplementedError

    def step(self, step: int, questions: Sequence[EncodedSample] | None) -> tuple[dict, list[dict]]:
        """One optimizer step -> (metrics over all ranks, rows of completions.jsonl). Collective.

        `questions`: this rank's; None where the step goes on with those of the step before."""
        raise NotImplementedError

    def summary(self, metrics: Mapping[str, float | None]) -> str:
        """The few numbers beside the progress bar."""
        raise NotImplementedError

    def draw(self, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
        """The run folder's curves.png."""
        raise NotImplementedError

    def max_steps(self) -> int:
        return self.config.max_steps

    def trainable(self, samples: list[Sample]) -> list[Sample]:
        """Those that a step can use, told before the first one. Their prompts fit already."""
        return samples

    def carried(self) -> dict:
        """What a checkpoint is to keep beside weights, optimizer and step; JSON's values."""
        return {"health": self.keeper.health.to_dict()}

    def carry(self, carried: dict) -> None:
        """Take up what `carried` gave, when a checkpoint is resumed."""
        self.health = Health.from_dict(carried["health"])

    def graded(self, response: str) -> str:
        """What of a held-out response goes to the rewards."""
        return response

    # What all do alike

    @property
    def prompts_per_step(self) -> int:
        """Over all ranks."""
        return self.config.prompts_per_rank * self.ranks.size

    def run(self) -> Path:
        """Train up to `max_steps`, judge before and after, and return the run folder.

        Raises Stopped when a signal ended it early; what was done by then is saved."""
        config, ranks = self.config, self.ranks
        if completed_step(self.folder) >= config.max_steps:
            log.info("%s: is complete (%d steps)", self.folder, self.done)
            watchdog.stop()
            return self.folder
        log.info(
            "%s: %d questions (%d held out), %d prompts a step, %d steps%s, %d rank(s) on %s",
            self.folder,
            len(self.train_samples),
            len(self.held_out_samples),
            self.prompts_per_step,
            config.max_steps,
            f" of which {self.done} are done" if self.done else "",
            ranks.size,
            ranks.device.type,
        )
        with self.stop.listening():
            if self.done == 0:
                self.before = self.judge()
            if ranks.is_main:
                self.tracker = Tracker(config, self.folder, self.done, self.trackers)
            self.rollout.should_cancel = lambda: self.stop.received
            try:
                self.train()
            except Stopped as asked:
                raise Stopped(self.save_and_say(asked)) from None
            except BaseException as error:
                with watchdog.no_progress_expected("saving"):
                    self.saver.finish(error)
                raise
            finally:
                self.rollout.should_cancel = None
        if self.tracker:
            self.tracker.close()
        after = self.judge()
        watchdog.stop()
        if ranks.is_main:
            self.draw(self.before, after)
            if self.before and after:
                save_held_out(self.folder, self.before, after)
                show(held_out_table(self.before, after))
            write_report([self.folder])
        self.saver.require_saved(self.done)
        if ranks.is_main:
            mark_completed(self.folder, self.done)
            log.info("run folder: %s", self.folder)
        return self.folder

    def train(self) -> None:
        """The steps that are left. Raises Stopped, on all ranks, when any of them was asked to stop."""
        config, ranks = self.config, self.ranks
        left = range(self.done + 1, config.max_steps + 1)
        bar = tqdm(
            left, desc=self.method, unit="step", initial=self.done, total=config.max_steps, disable=not ranks.is_main
        )
        questions = batches(
            self.asker,
            self.train_samples,
            [step for step in left if self.asks_anew(step)],
            per_rank=config.prompts_per_rank,
            rank=ranks.rank,
            ranks=ranks.size,
            seed=config.seed,
            every=self.steps_per_batch,
        )
        for step in bar:
            watchdog.beat("data", step)
            began = time.perf_counter()
            asked = next(questions) if self.asks_anew(step) else None
            waited = time.perf_counter() - began
            if asked is not None:
                self.heed_stop()
            metrics, rows = self.step(step, asked)
            metrics["time/data"] = waited
            self.done = step
            self.log_step(step, metrics, rows)
            bar.set_postfix_str(self.summary(metrics))
            self.saver.poll()
            if self.save_is_due(step):
                self.save()
        with watchdog.no_progress_expected("saving"):
            self.saver.poll(wait=True)
        self.heed_stop()

    def asks_anew(self, step: int) -> bool:
        """Whether a step begins with new questions: a place where a run can be gone on with."""
        return (step - 1) % self.steps_per_batch == 0

    def save_is_due(self, step: int) -> bool:
        every, batch = self.config.save_steps, self.steps_per_batch
        if step == self.config.max_steps:
            return True
        return bool(every) and self.asks_anew(step + 1) and step // every > (step - batch) // every

    def heed_stop(self) -> None:
        """Raises Stopped if any rank was asked to stop. Collective; at a place where a step has changed nothing yet."""
        received = [name for name in self.ranks.gather(self.stop.received) if name]
        if received:
            raise Stopped(received[0])

    def log_step(self, step: int, metrics: dict, rows: list[dict]) -> None:
        """Collective, as a disk that is full is everyone's."""
        if self.tracker:
            self.tracker.log(step, metrics, rows)
        problem = self.ranks.from_main(self.tracker.problem if self.tracker else None)
        if problem and self.config.on_save_error == "stop":
            raise SharedError(f"step {step}: {problem}; make room and go on with --resume_from_checkpoint last")
        if problem and self.ranks.is_main:
            log.warning("step %d: %s; the run goes on (--on_save_error continue)", step, problem)

    @watchdog.no_progress_expected("saving")
    def save_and_say(self, asked: Stopped) -> str:
        """Save the steps done so far; -> how to go on."""
        self.saver.poll(wait=True)
        if self.done and self.done != self.saver.last:
            self.save()
            self.saver.poll(wait=True)
        if self.tracker:
            self.tracker.close()
        again = f"--resume_from_checkpoint last --output_dir {self.folder}"
        unsaved = "" if self.saver.last == (self.done or None) else f" ({self.saver.last_saved})"
        return f"stopped by {asked} after step {self.done}{unsaved}; go on with {again}"

    def share_out(self, groups: Sequence[Group]) -> StepBatches:
        """The packed rows that this rank trains on."""
        return share_out(
            groups,
            self.ranks,
            self.policy,
            lambda index: self.asker.ask(self.train_samples[index], index),
            self.budget.at(self.at_step + self.steps_per_batch - 1),
            skip_without_signal=self.skips_groups_without_signal,
        )

    def optimize(self, work: StepBatches, *counts: int) -> tuple[list[Tensor], float, float]:
        """All passes, then the optimizer step, unless a loss or gradient is not finite. Collective.

        `work` is cut again, in place, where a pass does not fit into memory. `counts`: what the objective is given
        beside a batch. -> ([what it returned, stacked over the passes], gradient norm, nan where the step was left
        out, learning rate of the step)."""
        learning_rate = self.engine.get_lr()[0]
        self.engine.train()  # gradient checkpointing works in training mode alone; there is no dropout
        results = self.budget.fit(
            work,
            lambda: self.accumulate(work.batches, counts),
            undo=lambda: drop_gradients(self.engine),
            step=self.at_step,
        )
        self.engine.eval()
        stacked = [torch.stack(values) for values in zip(*results, strict=True)]
        grad_norm = self.keeper.step(self.at_step, work.batches, stacked[0])
        return stacked, grad_norm, learning_rate

    def accumulate(self, batches: Sequence[MicroBatch], counts: Sequence[int]) -> list[tuple]:
        """Forward and backward of every pass -> what the objective returned, the loss detached."""
        results = []
        for number, batch in enumerate(batches, 1):
            watchdog.beat()
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            with self.budget.together():
                loss, *rest = self.engine(batch, *counts)
            with self.budget.alone(batch, self.at_step):
                # ZeRO averages gradients over ranks; the loss is already a share of the global mean, so it is to be
                # summed.
                self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
            results.append((loss.detach(), *rest))
        return results

    def usable(self, question: EncodedSample, tokens: Sequence[Sequence[int]], step: int) -> bool:
        """Whether a question with these answers can be trained on; if not, the asker writes down why."""
        limit, vocabulary = self.config.max_prompt_length, self.policy.head.shape[0]
        try:
            check_group(question.prompt, tokens, vocabulary, limit)
        except UserError as error:
            self.asker.skip(question.sample, error, step)
            return False
        return True

    def settle_skipped(self) -> int:
        """List what any rank left out since the last call. Collective. Raises UserError on all ranks under
        `on_bad_sample: error`."""
        parts = self.ranks.gather(self.asker.take_skipped())
        rows = [row for part in parts for row in part]
        if self.ranks.is_main:
            self.list_skipped(rows)
        if rows and self.config.on_bad_sample == "error":
            raise SharedError("step {step}, {where}: {reason}".format(**rows[0]))
        return len(rows)

    def list_skipped(self, rows: Sequence[dict]) -> None:
        if rows:
            with (self.folder / "skipped.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def judge(self) -> HeldOutScores | None:
        if not self.held_out_samples:
            return None
        watchdog.beat("held-out questions")
        arguments = (self.rollout, self.asker, self.held_out_samples, self.config, self.ranks)
        return evaluate_held_out(*arguments, graded=self.graded)

    @watchdog.no_progress_expected("saving")
    def save(self) -> None:
        """Write a checkpoint of the steps done so far, or begin to. Collective."""
        state, tracker = state_of(self, self.done), self.tracker

        def rest(folder: Path, weights: dict[str, Tensor]) -> None:
            if tracker:
                tracker.flush()  # a checkpoint must not be ahead of the logs
            flush_lists(self.folder)
            write_rest(self, state, folder, weights)

        self.saver.start(self.done, self.policy.module, self.engine.optimizer, rest)
