"""GRPO, told once: ask, answer, judge, compare, update.

Everything of an optimizer step is rolled out at once: the weights do not change inside a step, so that is exact.
Shapes: S sequences (completions) of this rank in the step, N their tokens, G completions per prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from vtfast_kernels.group_advantage import group_advantage

from vtfast import distributed
from vtfast.checkpoint import check_output_dir, create_run_folder, save_checkpoint
from vtfast.config import Config
from vtfast.errors import UserError
from vtfast.evaluate.held_out import HeldOut, held_out
from vtfast.flops import update_flops
from vtfast.groups import Group, completion_rows, reward
from vtfast.liger import use_liger
from vtfast.lora import add_lora
from vtfast.metrics import Timer, memory_gb, mfu, step_metrics, summary
from vtfast.model import load_model
from vtfast.objective import SUMS, Objective, loss_spec
from vtfast.packing import check_group
from vtfast.processor import Processor
from vtfast.prompts import response_prefix
from vtfast.questions import Asker, Question, batches, load_questions, render_synthetic
from vtfast.reference import Reference
from vtfast.report import draw_curves, held_out_table
from vtfast.rewards.scorer import Scorer
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.scoring import packed_logprobs
from vtfast.sharing import Work, share_out
from vtfast.tracking import Tracker, check_trackers

log = logging.getLogger("vtfast")


class Trainer:
    """Everything of a run. Construction raises UserError for bad input and leaves nothing behind on disk."""

    def __init__(self, config: Config) -> None:
        check_output_dir(config)
        check_trackers(config.report_to)
        self.config = config
        self.scorer = Scorer(
            config.reward_funcs, config.reward_mode,
            workers=config.reward_workers, timeout=config.reward_timeout,
        )  # fmt: skip
        self.ranks = ranks = distributed.start(config)
        torch.manual_seed(config.seed)

        dtype = "bfloat16" if ranks.device.type == "cuda" else "float32"
        dtype = dtype if config.dtype == "auto" else config.dtype
        path = _model_path(config.model)
        if config.use_peft and (Path(path) / "adapter_config.json").is_file():
            raise UserError(
                f"--model {config.model}: holds LoRA adapters already, and new ones would not know them; save the"
                " merged model first (vtfast.model.load_model(folder).module.save_pretrained(new folder))"
            )
        self.processor = Processor.from_pretrained(path, config.min_pixels, config.max_pixels)
        self.asker = Asker(config, self.processor)
        self.policy = load_model(
            path, dtype, str(ranks.device), config.freeze, config.attn_implementation
        )
        if config.use_liger_kernel and ranks.device.type == "cuda":
            use_liger(self.policy)
        if config.use_peft:
            add_lora(self.policy, config.lora_r, config.lora_alpha, config.lora_target_modules)
        self.reference = (
            Reference(self.policy, config.offload_reference) if config.beta > 0 else None
        )
        if config.gradient_checkpointing:
            self.policy.module.gradient_checkpointing_enable({"use_reentrant": False})

        with tempfile.TemporaryDirectory() as scratch:  # a start that fails leaves nothing behind
            rendered = render_synthetic(config, Path(scratch) / "data")
            samples = load_questions(config, self.asker, rendered)
            self.train_samples, self.held_out_samples = samples["train"], samples.get("val", [])
            objective = Objective(
                self.policy, loss_spec(config), config.vllm_importance_sampling_correction
            )
            self.engine = distributed.zero2_engine(config, objective)
            self.rollout = RolloutEngine(self.policy)
            folder = str(create_run_folder(config)) if ranks.is_main else ""
            self.folder = Path(ranks.from_main(folder))
            if ranks.is_main and rendered.exists():
                shutil.move(rendered, self.folder / "data")
        self.groups: list[Group] = []
        self.work = Work([], 0, 0, 0.0)
        if ranks.is_main:
            (self.folder / "config.yaml").write_text(config.to_yaml())
            self.list_skipped(self.asker.skipped)
        self.asker.skipped = []

    def run(self) -> Path:
        """Train for `max_steps`, judge before and after, and return the run folder."""
        config, ranks = self.config, self.ranks
        log.info(
            "%s: %d questions (%d held out), %d prompts x %d completions a step, %d rank(s) on %s",
            self.folder, len(self.train_samples), len(self.held_out_samples),
            distributed.prompts_per_rank(config) * ranks.size, config.num_generations, ranks.size, ranks.device.type,
        )  # fmt: skip
        before = self.judge()
        tracker = Tracker(config, self.folder) if ranks.is_main else None
        bar = tqdm(
            range(1, config.max_steps + 1), desc="GRPO", unit="step", disable=not ranks.is_main
        )
        questions = batches(
            self.asker, self.train_samples, range(1, config.max_steps + 1, config.num_iterations),
            per_rank=distributed.prompts_per_rank(config), rank=ranks.rank, ranks=ranks.size, seed=config.seed,
            every=config.num_iterations,
        )  # fmt: skip
        for step in bar:
            fresh = (step - 1) % config.num_iterations == 0
            metrics, rows = self.step(step, next(questions) if fresh else None)
            if tracker:
                tracker.log(step, metrics, rows)
                bar.set_postfix_str(summary(metrics))
            if step == config.max_steps or (config.save_steps and step % config.save_steps == 0):
                self.save(step)
        self.scorer.close()
        if tracker:
            tracker.close()
        after = self.judge()
        if ranks.is_main:
            draw_curves(self.folder, before, after)
            if before and after:
                print(held_out_table(before, after))
            log.info("run folder: %s", self.folder)
        return self.folder

    def step(self, step: int, questions: Sequence[Question] | None) -> tuple[dict, list[dict]]:
        """One optimizer step -> (metrics over all ranks, a row per new completion). Collective.

        `questions`: this rank's; None goes on with the answers of the step before (`num_iterations`).
        """
        config, timer = self.config, Timer()
        began = time.perf_counter()
        with self.policy.images.open():
            with timer.phase("time/rollout"):
                skipped = 0
                if questions is not None:
                    self.groups = self.answer(questions, step)
                    skipped = self.settle_skipped()
            with timer.phase("time/score"):
                if questions is not None:
                    self.compare(self.groups)
                    self.work = self.share_out(self.groups)
                    self.score_old(self.work)
            with timer.phase("time/update"):
                sums, grad_norm, learning_rate = self.update(self.work)
        seconds = time.perf_counter() - began
        answered = step_metrics(self.groups, sums, config.reward_funcs, self.ranks)
        flops = update_flops(self.policy, self.work.batches)
        drift = answered["sampler_drift"]
        if drift is not None and drift > config.sampler_drift_warning and self.ranks.is_main:
            log.warning(
                "step %d: sampled and trained log-probs differ by %.3g on average, %.3g at most",
                step, drift, answered["sampler_drift_max"],
            )  # fmt: skip
        metrics = {
            "step": step,
            **answered,
            "frac_groups_skipped": self.work.skipped,
            "skipped_samples": skipped,
            "passes": len(self.work.batches),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **timer.seconds,
            "time/step": seconds,
            "tokens_per_second": answered["num_tokens"] / seconds,
            "mfu": mfu(flops, timer.seconds["time/update"], self.ranks.device),
            "memory_gb": memory_gb(self.ranks.device),
        }
        if questions is None:
            return metrics, []
        mine = completion_rows(step, self.groups, config.reward_funcs)
        rows = [row for part in self.ranks.gather(mine) for row in part]
        return metrics, rows

    def answer(self, questions: Sequence[Question], step: int) -> list[Group]:
        """G sampled answers to each question, with their rewards. What cannot be trained on is left out and listed."""
        config = self.config
        questions = [question for question in questions if self.usable(question, [], step)]
        completions = self.rollout.generate(
            [question.prompt for question in questions],
            config.num_generations,
            Sampling(config.temperature, config.max_completion_length),
            seed=_step_seed(config.seed, step),
            progress=self.ranks.is_main,
        )
        prefix = response_prefix(self.asker.template)
        groups = []
        for question, answers in zip(questions, completions, strict=True):
            if not self.usable(question, [answer.tokens for answer in answers], step):
                continue
            texts = [prefix + self.processor.decode(answer.tokens) for answer in answers]
            groups.append(Group(question, answers, texts))
        reward(groups, self.scorer, prefix, progress=self.ranks.is_main)
        return groups

    def compare(self, groups: Sequence[Group]) -> None:
        """Each answer's advantage over the other answers to its question."""
        weights = torch.tensor(self.config.reward_weights or [1.0] * len(self.scorer.names))
        for group in groups:
            group.total = weights @ group.rewards
        totals = self.ranks.gather([group.total for group in groups])
        everyone = [total for part in totals for total in part]
        if not everyone:
            raise UserError("none of this step's questions could be used; skipped.jsonl says why")
        G = self.config.num_generations
        advantage = group_advantage(torch.cat(everyone), G, scale=self.config.scale_rewards)
        first = sum(len(part) for part in totals[: self.ranks.rank])
        mine = advantage.split(G)[first : first + len(groups)]
        for group, values in zip(groups, mine, strict=True):
            group.advantage = values

    def share_out(self, groups: Sequence[Group]) -> Work:
        """The packed rows that this rank trains on."""
        return share_out(
            groups,
            self.ranks,
            self.policy,
            lambda index: self.asker.ask(self.train_samples[index], index),
            self.config.tokens_per_pass,
            skip_without_signal=self.config.beta == 0,
        )

    @torch.no_grad()
    def score_old(self, work: Work) -> None:
        """Log-probs before the update: the reference model's for the KL, the policy's own if it is updated twice."""
        scorers = []
        if self.reference:
            scorers.append(("reference", self.reference.at_hand()))
        if self.config.num_iterations > 1:
            scorers.append(("old", contextlib.nullcontext(self.policy)))
        for whose, at_hand in scorers:
            with at_hand as policy:
                for batch in work.batches:
                    if batch.parts:
                        logps = packed_logprobs(policy, batch.pack, self.config.temperature)
                        batch.write(whose, logps)

    def update(self, work: Work) -> tuple[dict[str, float], float, float]:
        """Forward, backward and the optimizer step -> (sums over this rank's tokens, gradient norm, learning rate)."""
        learning_rate = self.engine.get_lr()[0]
        losses, sums, drift = torch.zeros(()), torch.zeros(len(SUMS)), torch.zeros(())
        self.engine.train()  # gradient checkpointing works in training mode alone; there is no dropout
        for number, batch in enumerate(work.batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(work.batches))
            loss, parts, largest = self.engine(batch, work.num_sequences, work.num_tokens)
            # ZeRO averages gradients over ranks; the loss is already a share of the global mean, so it is to be summed.
            self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
            losses, sums = losses.to(loss.device) + loss.detach(), sums.to(parts.device) + parts
            drift = torch.maximum(drift.to(largest.device), largest)
        self.engine.step()
        self.engine.eval()
        lengths = [group.lengths[i] for batch in work.batches for group, i in batch.sequences]
        result = dict(zip(("loss", *SUMS), [float(losses), *sums.tolist()], strict=True))
        result["scored_tokens"] = float(sum(lengths))
        result["sampler_drift_max"] = float(drift)
        return result, float(self.engine.get_global_grad_norm()), learning_rate

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
        return held_out(self.rollout, self.asker, self.held_out_samples, self.config, self.ranks)

    def save(self, step: int) -> None:
        if self.ranks.is_main:
            folder = self.folder / "checkpoints" / f"step-{step}"
            save_checkpoint(folder, self.policy, self.processor, self.config.save_total_limit)
        self.ranks.barrier()


def _model_path(name: str) -> str:
    """The shipped base by its name; anything else is a folder or hub id."""
    assets = Path(__file__).parent / "assets"
    return str(assets / name) if (assets / name).is_dir() and not Path(name).exists() else name


def _step_seed(seed: int, step: int) -> int:
    """A 63-bit seed of the step's sampling; neighbouring steps and seeds share nothing."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
