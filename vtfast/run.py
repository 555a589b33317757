"""What every kind of training shares: the start, the run folder, the loop, judging and saving.

`trainer.Trainer` (GRPO) and `sft.SFTTrainer` say what their loss is and what a step does.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vtfast import distributed, heartbeat
from vtfast.checkpoint import check_output_dir, create_run_folder, save_checkpoint
from vtfast.config import RunConfig
from vtfast.data import Sample
from vtfast.errors import UserError
from vtfast.evaluate.held_out import HeldOut, held_out
from vtfast.groups import Group
from vtfast.hub import model_path
from vtfast.liger import use_liger
from vtfast.lora import add_lora
from vtfast.model import load_model
from vtfast.packing import check_group
from vtfast.processor import Processor
from vtfast.questions import Asker, Question, batches, load_questions, render_synthetic
from vtfast.report import held_out_table, save_held_out, write_report
from vtfast.rollout.choice import choose_engine
from vtfast.sharing import Work, share_out
from vtfast.tracking import Tracker, check_trackers

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
        check_output_dir(config)
        check_trackers(config.report_to)
        self.config = config
        self.ranks = ranks = distributed.start(config)
        torch.manual_seed(config.seed)

        path = model_path(config.model)
        if config.use_peft and (Path(path) / "adapter_config.json").is_file():
            raise UserError(
                f"--model {config.model}: holds LoRA adapters already, and new ones would not know them; save the"
                " merged model first (vtfast.model.load_model(folder).module.save_pretrained(new folder))"
            )
        self.processor = Processor.from_pretrained(path, config.min_pixels, config.max_pixels)
        self.asker = Asker(config, self.processor)
        self.policy = load_model(
            path, config.dtype, str(ranks.device), config.freeze, config.attn_implementation
        )
        if config.use_liger_kernel and ranks.device.type == "cuda":
            use_liger(self.policy)
        if config.use_peft:
            add_lora(self.policy, config.lora_r, config.lora_alpha, config.lora_target_modules)
        objective = self.objective()
        if config.gradient_checkpointing:
            self.policy.module.gradient_checkpointing_enable({"use_reentrant": False})

        with tempfile.TemporaryDirectory() as scratch:  # a start that fails leaves nothing behind
            rendered = render_synthetic(config, Path(scratch) / "data")
            samples = load_questions(config, self.asker, rendered)
            self.train_samples = self.trainable(samples["train"])
            self.held_out_samples = samples.get("val", [])
            config.max_steps = self.max_steps()
            self.engine = distributed.zero2_engine(config, objective)
            most_images = max(len(s.images) for part in samples.values() for s in part)
            self.rollout = choose_engine(config, self.policy, self.processor, path, most_images)
            folder = str(create_run_folder(config)) if ranks.is_main else ""
            self.folder = Path(ranks.from_main(folder))
            if ranks.is_main and rendered.exists():
                shutil.move(rendered, self.folder / "data")
        if ranks.is_main:
            (self.folder / "config.yaml").write_text(config.to_yaml())
            self.list_skipped(self.asker.skipped)
        self.asker.skipped = []

    # What a kind of training says of itself

    def objective(self) -> nn.Module:
        """The module that DeepSpeed trains: the arguments of a pass -> (loss, tensors that `optimize` collects).
        Called once, when `policy` is as it will be trained."""
        raise NotImplementedError

    def step(self, step: int, questions: Sequence[Question] | None) -> tuple[dict, list[dict]]:
        """One optimizer step -> (metrics over all ranks, rows of completions.jsonl). Collective.

        `questions`: this rank's; None where the step goes on with those of the step before."""
        raise NotImplementedError

    def summary(self, metrics: Mapping[str, float]) -> str:
        """The few numbers beside the progress bar."""
        raise NotImplementedError

    def draw(self, before: HeldOut | None, after: HeldOut | None) -> None:
        """The run folder's curves.png."""
        raise NotImplementedError

    def max_steps(self) -> int:
        return self.config.max_steps

    def trainable(self, samples: list[Sample]) -> list[Sample]:
        """Those that a step can use, told before the first one. Their prompts fit already."""
        return samples

    def graded(self, response: str) -> str:
        """What of a held-out response goes to the rewards."""
        return response

    # What all do alike

    @property
    def prompts_per_step(self) -> int:
        """Over all ranks."""
        return distributed.prompts_per_rank(self.config) * self.ranks.size

    def run(self) -> Path:
        """Train for `max_steps`, judge before and after, and return the run folder."""
        config, ranks = self.config, self.ranks
        log.info(
            "%s: %d questions (%d held out), %d prompts a step, %d steps, %d rank(s) on %s",
            self.folder, len(self.train_samples), len(self.held_out_samples), self.prompts_per_step,
            config.max_steps, ranks.size, ranks.device.type,
        )  # fmt: skip
        before = self.judge()
        tracker = Tracker(config, self.folder) if ranks.is_main else None
        bar = tqdm(
            range(1, config.max_steps + 1),
            desc=self.method,
            unit="step",
            disable=not ranks.is_main,
        )
        questions = batches(
            self.asker, self.train_samples, range(1, config.max_steps + 1, self.steps_per_batch),
            per_rank=distributed.prompts_per_rank(config), rank=ranks.rank, ranks=ranks.size, seed=config.seed,
            every=self.steps_per_batch,
        )  # fmt: skip
        for step in bar:
            heartbeat.beat("data", step)
            fresh = (step - 1) % self.steps_per_batch == 0
            began = time.perf_counter()
            asked = next(questions) if fresh else None
            waited = time.perf_counter() - began
            metrics, rows = self.step(step, asked)
            metrics["time/data"] = waited
            if tracker:
                tracker.log(step, metrics, rows)
                bar.set_postfix_str(self.summary(metrics))
            if step == config.max_steps or (config.save_steps and step % config.save_steps == 0):
                with heartbeat.patient("saving"):
                    self.save(step)
        if tracker:
            tracker.close()
        after = self.judge()
        heartbeat.leave()
        if ranks.is_main:
            self.draw(before, after)
            if before and after:
                save_held_out(self.folder, before, after)
                print(held_out_table(before, after))
            write_report([self.folder])
            log.info("run folder: %s", self.folder)
        return self.folder

    def share_out(self, groups: Sequence[Group]) -> Work:
        """The packed rows that this rank trains on."""
        return share_out(
            groups,
            self.ranks,
            self.policy,
            lambda index: self.asker.ask(self.train_samples[index], index),
            self.config.tokens_per_pass,
            skip_without_signal=self.skips_groups_without_signal,
        )

    def optimize(self, passes: Sequence[Sequence]) -> tuple[list[Tensor], float, float]:
        """Forward and backward of every pass, then the optimizer step.

        `passes`: arguments of the objective. -> ([what it returned, stacked over the passes], gradient norm, learning
        rate of the step)."""
        learning_rate = self.engine.get_lr()[0]
        results = []
        self.engine.train()  # gradient checkpointing works in training mode alone; there is no dropout
        for number, arguments in enumerate(passes, 1):
            heartbeat.beat()
            self.engine.set_gradient_accumulation_boundary(number == len(passes))
            loss, *rest = self.engine(*arguments)
            # ZeRO averages gradients over ranks; the loss is already a share of the global mean, so it is to be summed.
            self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
            results.append((loss.detach(), *rest))
        self.engine.step()
        self.engine.eval()
        stacked = [torch.stack(values) for values in zip(*results, strict=True)]
        return stacked, float(self.engine.get_global_grad_norm()), learning_rate

    def usable(self, question: Question, tokens: Sequence[Sequence[int]], step: int) -> bool:
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
            raise UserError(f"step {rows[0]['step']}, row {rows[0]['row']}: {rows[0]['reason']}")
        return len(rows)

    def list_skipped(self, rows: Sequence[dict]) -> None:
        if rows:
            with (self.folder / "skipped.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def judge(self) -> HeldOut | None:
        if not self.held_out_samples:
            return None
        heartbeat.beat("held-out questions")
        arguments = (self.rollout, self.asker, self.held_out_samples, self.config, self.ranks)
        return held_out(*arguments, graded=self.graded)

    def save(self, step: int) -> None:
        if self.ranks.is_main:
            folder = self.folder / "checkpoints" / f"step-{step}"
            save_checkpoint(folder, self.policy, self.processor, self.config.save_total_limit)
        self.ranks.barrier()
