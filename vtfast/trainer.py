"""GRPO, told once: ask, answer, judge, compare, update.

Everything of an optimizer step is rolled out at once: the weights do not change inside a step, so that is exact.
Shapes: S sequences (completions) of this rank in the step, N their tokens, G completions per prompt.
"""

from __future__ import annotations

import copy
import hashlib
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
from vtfast.evaluate.held_out import HeldOut, held_out
from vtfast.groups import Group, completion_rows
from vtfast.metrics import Timer, memory_gb, mfu, step_metrics, summary
from vtfast.model import load_model
from vtfast.objective import Objective, loss_spec
from vtfast.processor import Processor
from vtfast.prompts import response_prefix
from vtfast.questions import Asker, Question, batches, load_questions, render_synthetic
from vtfast.report import draw_curves, held_out_table
from vtfast.rewards import get_reward, score
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.scoring import completion_logprobs
from vtfast.tracking import Tracker, check_trackers

log = logging.getLogger("vtfast")


class Trainer:
    """Everything of a run. Construction raises UserError for bad input and leaves nothing behind on disk."""

    def __init__(self, config: Config) -> None:
        check_output_dir(config)
        check_trackers(config.report_to)
        self.config = config
        self.rewards = {name: get_reward(name) for name in config.reward_funcs}
        self.ranks = ranks = distributed.start(config)
        torch.manual_seed(config.seed)

        dtype = "bfloat16" if ranks.device.type == "cuda" else "float32"
        dtype = dtype if config.dtype == "auto" else config.dtype
        path = _model_path(config.model)
        self.processor = Processor.from_pretrained(path, config.min_pixels, config.max_pixels)
        self.asker = Asker(config, self.processor)
        self.policy = load_model(path, dtype, str(ranks.device), config.freeze)
        self.reference = copy.deepcopy(self.policy) if config.beta > 0 else None
        if config.gradient_checkpointing:
            self.policy.module.gradient_checkpointing_enable({"use_reentrant": False})

        with tempfile.TemporaryDirectory() as scratch:  # a start that fails leaves nothing behind
            rendered = render_synthetic(config, Path(scratch) / "data")
            samples = load_questions(config, self.asker, rendered)
            self.train_samples, self.held_out_samples = samples["train"], samples.get("val", [])
            self.engine = distributed.zero2_engine(
                config, Objective(self.policy, loss_spec(config))
            )
            self.rollout = RolloutEngine(self.policy)
            folder = str(create_run_folder(config)) if ranks.is_main else ""
            self.folder = Path(ranks.from_main(folder))
            if ranks.is_main and rendered.exists():
                shutil.move(rendered, self.folder / "data")
        if ranks.is_main:
            (self.folder / "config.yaml").write_text(config.to_yaml())

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
        steps = range(1, config.max_steps + 1)
        bar = tqdm(steps, desc="GRPO", unit="step", disable=not ranks.is_main)
        questions = batches(
            self.asker, self.train_samples, steps,
            per_rank=distributed.prompts_per_rank(config), rank=ranks.rank, ranks=ranks.size, seed=config.seed,
        )  # fmt: skip
        for step, asked in zip(bar, questions, strict=True):
            metrics, rows = self.step(step, asked)
            if tracker:
                tracker.log(step, metrics, rows)
                bar.set_postfix_str(summary(metrics))
            if step == config.max_steps or (config.save_steps and step % config.save_steps == 0):
                self.save(step)
        if tracker:
            tracker.close()
        after = self.judge()
        if ranks.is_main:
            draw_curves(self.folder, before, after)
            if before and after:
                print(held_out_table(before, after))
            log.info("run folder: %s", self.folder)
        return self.folder

    def step(self, step: int, questions: Sequence[Question]) -> tuple[dict, list[dict]]:
        """One optimizer step on this rank's `questions` -> (metrics over all ranks, a row per completion)."""
        config, timer = self.config, Timer()
        began = time.perf_counter()
        with timer.phase("time/rollout"):
            groups = self.answer(questions, step)
        with timer.phase("time/score"):
            self.compare(groups)
            if self.reference:
                self.score_reference(groups)
        with timer.phase("time/update"):
            sums, grad_norm, learning_rate = self.update(groups)
        seconds = time.perf_counter() - began
        answered = step_metrics(groups, sums, config.reward_funcs, self.ranks)
        metrics = {
            "step": step,
            **answered,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **timer.seconds,
            "time/step": seconds,
            "tokens_per_second": answered["num_tokens"] / seconds,
            "mfu": mfu(self.policy.module, _useful_tokens(groups), timer.seconds["time/update"]),
            "memory_gb": memory_gb(self.ranks.device),
        }
        mine = completion_rows(step, groups, config.reward_funcs)
        rows = [row for part in self.ranks.gather(mine) for row in part]
        return metrics, rows

    def answer(self, questions: Sequence[Question], step: int) -> list[Group]:
        """G sampled answers to each question, with their rewards."""
        config = self.config
        completions = self.rollout.generate(
            [question.prompt for question in questions],
            config.num_generations,
            Sampling(config.temperature, config.max_completion_length),
            seed=_step_seed(config.seed, step),
        )
        prefix = response_prefix(self.asker.template)
        groups = []
        for question, answers in zip(questions, completions, strict=True):
            texts = [prefix + self.processor.decode(answer.tokens) for answer in answers]
            rewards = [
                [
                    score(name, reward, text, question.sample, len(answer.tokens))
                    for text, answer in zip(texts, answers, strict=True)
                ]
                for name, reward in self.rewards.items()
            ]
            groups.append(Group(question, answers, texts, torch.tensor(rewards)))
        return groups

    def compare(self, groups: Sequence[Group]) -> None:
        """Each answer's advantage over the other answers to its question."""
        weights = torch.tensor(self.config.reward_weights or [1.0] * len(self.rewards))
        for group in groups:
            group.total = weights @ group.rewards
        everyone = torch.cat(
            [total for part in self.ranks.gather([g.total for g in groups]) for total in part]
        )
        advantage = group_advantage(
            everyone, self.config.num_generations, scale=self.config.scale_rewards
        ).split(self.config.num_generations)
        first = self.ranks.rank * len(groups)
        for group, values in zip(groups, advantage[first : first + len(groups)], strict=True):
            group.advantage = values

    @torch.no_grad()
    def score_reference(self, groups: Sequence[Group]) -> None:
        for micro in self.micro_batches(groups):
            scores = completion_logprobs(
                self.reference,
                [group.question.prompt for group in micro],
                [group.tokens for group in micro],
                temperature=self.config.temperature,
            )
            for group, logps in zip(micro, scores, strict=True):
                group.reference = logps

    def update(self, groups: Sequence[Group]) -> tuple[dict[str, float], float, float]:
        """Forward, backward and the optimizer step -> (sums over this rank's tokens, gradient norm, learning rate)."""
        lengths = [len(tokens) for group in groups for tokens in group.tokens]
        counts = self.ranks.gather((len(lengths), sum(lengths)))
        num_sequences, num_tokens = map(sum, zip(*counts, strict=True))
        learning_rate = self.engine.get_lr()[0]
        sums = {"loss": 0.0, "tokens": float(sum(lengths))}
        self.engine.train()  # gradient checkpointing works in training mode alone; there is no dropout
        for micro in self.micro_batches(groups):
            loss, parts = self.engine(micro, num_sequences, num_tokens)
            # ZeRO averages gradients over ranks; the loss is already a share of the global mean, so it is to be summed.
            self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
            self.engine.step()
            sums["loss"] += float(loss.detach())
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + value
        self.engine.eval()
        return sums, float(self.engine.get_global_grad_norm()), learning_rate

    def micro_batches(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        size = self.config.per_device_train_batch_size
        return [groups[i : i + size] for i in range(0, len(groups), size)]

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


def _useful_tokens(groups: Sequence[Group]) -> int:
    """Tokens that the update must read: each prompt once, each completion once."""
    return sum(len(g.question.prompt.ids) + sum(map(len, g.tokens)) for g in groups)


def _step_seed(seed: int, step: int) -> int:
    """A 63-bit seed of the step's sampling; neighbouring steps and seeds share nothing."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
