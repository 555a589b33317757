"""GRPO, told once: ask, answer, judge, compare, update.

Everything of an optimizer step is rolled out at once: the weights do not change inside a step, so that is exact.
Shapes: S sequences (completions) of this rank in the step, N their tokens, G completions per prompt.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from vtfast_kernels.group_advantage import group_advantage

from vtfast.config import Config
from vtfast.cost.devices import mfu
from vtfast.data.prompt_builder import EncodedSample
from vtfast.data.prompt_templates import response_prefix
from vtfast.distributed import watchdog
from vtfast.evaluate.held_out import HeldOutScores
from vtfast.model.policy import Policy
from vtfast.model.reference_model import ReferenceModel
from vtfast.report import draw_curves
from vtfast.rewards.manager import RewardManager
from vtfast.rollout import Sampling
from vtfast.rollout.engine import RolloutCancelled
from vtfast.scoring import packed_logprobs
from vtfast.training.groups import Group, reward
from vtfast.training.grpo_objective import SUMS, GRPOObjective, loss_spec
from vtfast.training.health import warn
from vtfast.training.load_balancing import StepBatches
from vtfast.training.loop import Run
from vtfast.training.metrics import Timer, completion_rows, process_metrics, step_metrics, summary, update_flops
from vtfast.training.preflight import check_start
from vtfast.training.speed import Roofline

NOTHING = dict.fromkeys((*SUMS, "loss", "scored_tokens", "sampler_drift_max"), 0.0)
"""The sums of a step in which no question could be used."""


class Trainer(Run):
    """GRPO. Construction raises UserError for bad input and leaves nothing behind on disk."""

    config: Config
    method = "GRPO"

    def __init__(self, config: Config) -> None:
        check_start(config)
        self.scorer = RewardManager(
            config.reward_funcs, config.reward_mode, workers=config.reward_workers, timeout=config.reward_timeout
        )
        self.sampling = Sampling(
            config.temperature,
            config.max_completion_length,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        )
        self.groups: list[Group] = []
        self.work = StepBatches([], 0, 0, 0.0)
        super().__init__(config)
        self.roofline = Roofline(config, self.policy, self.ranks)

    def objective(self) -> GRPOObjective:
        config = self.config
        self.reference = ReferenceModel(self.policy, config.offload_reference) if config.beta > 0 else None
        return GRPOObjective(self.policy, loss_spec(config), config.vllm_importance_sampling_correction)

    def run(self) -> Path:
        try:
            return super().run()
        finally:
            self.scorer.close()

    @property
    def steps_per_batch(self) -> int:
        return self.config.num_iterations

    @property
    def skips_groups_without_signal(self) -> bool:
        return self.config.beta == 0  # the KL is a signal of its own

    def summary(self, metrics: Mapping[str, float | None]) -> str:
        return summary(metrics)

    def draw(self, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
        draw_curves(self.folder, before, after)

    def step(self, step: int, questions: Sequence[EncodedSample] | None) -> tuple[dict, list[dict]]:
        """One optimizer step -> (metrics over all ranks, a row per new completion). Collective.

        `questions`: this rank's; None goes on with the answers of the step before (`num_iterations`).
        """
        config, timer = self.config, Timer()
        began, self.at_step = time.perf_counter(), step
        with self.policy.cache_image_features():
            with timer.phase("time/rollout"):
                skipped = 0
                if questions is not None:
                    with contextlib.suppress(RolloutCancelled):
                        self.groups = self.answer(questions, step)
                    self.heed_stop()
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
        warn(self.keeper.health, step, answered, config)
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
            **self.rollout_seconds(questions),
            "tokens_per_second": answered["num_tokens"] / seconds,
            "mfu": mfu(flops, timer.seconds["time/update"], self.ranks.device),
            **self.keeper.health.metrics(),
            "token_budget": self.budget.tokens,
            **process_metrics(self.ranks.device),
        }
        metrics |= self.roofline.metrics(step, self.groups, metrics)
        if questions is None:
            return metrics, []
        mine = completion_rows(step, self.groups, config.reward_funcs)
        parts = enumerate(self.ranks.gather(mine))
        return metrics, [{**row, "rank": rank} for rank, part in parts for row in part]

    def rollout_seconds(self, questions: Sequence[EncodedSample] | None) -> dict[str, float]:
        """This rank's prefill and decode; nothing where the step had no rollout or the engine does not tell."""
        seconds = {} if questions is None else self.rollout.last_timings
        return {f"rollout/{part}_seconds": value for part, value in seconds.items()}

    def answer(self, questions: Sequence[EncodedSample], step: int) -> list[Group]:
        """G sampled answers to each question, with their rewards. What cannot be trained on is left out and listed."""
        config = self.config
        questions = [question for question in questions if self.usable(question, [], step)]
        completions = self.rollout.generate(
            [question.prompt for question in questions],
            config.num_generations,
            self.sampling,
            seed=_step_seed(config.seed, step),
            progress=self.ranks.is_main,
        )
        prefix = response_prefix(self.asker.template)
        groups = []
        for question, answers in zip(questions, completions, strict=True):
            if not self.usable(question, [answer.tokens for answer in answers], step):
                continue
            if not all(math.isfinite(x) for answer in answers for x in answer.logprobs):
                self.asker.skip(question.sample, "the sampler's log-probs are not finite", step)
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
            return
        G = self.config.num_generations
        advantage = group_advantage(torch.cat(everyone), G, scale=self.config.scale_rewards)
        first = sum(len(part) for part in totals[: self.ranks.rank])
        mine = advantage.split(G)[first : first + len(groups)]
        for group, values in zip(groups, mine, strict=True):
            group.advantage = values

    def score_old(self, work: StepBatches) -> None:
        """Log-probs before the update: the reference model's for the KL, the policy's own if it is updated twice."""
        scorers: list[tuple[str, contextlib.AbstractContextManager[Policy]]] = []
        if self.reference:
            scorers.append(("reference", self.reference.policy()))
        if self.config.num_iterations > 1:
            scorers.append(("old", contextlib.nullcontext(self.policy)))
        for whose, at_hand in scorers:
            with at_hand as policy:
                score = functools.partial(self.score, policy, whose, work)
                self.budget.fit(work, score, step=self.at_step)

    @torch.no_grad()
    def score(self, policy: Policy, whose: str, work: StepBatches) -> None:
        with self.budget.together():
            for batch in work.batches:
                watchdog.beat()
                if batch.parts:
                    batch.write(whose, packed_logprobs(policy, batch.pack, self.config.temperature))

    def update(self, work: StepBatches) -> tuple[dict[str, float], float, float]:
        """Forward, backward and the optimizer step -> (sums over this rank's tokens, gradient norm, learning rate)."""
        if work.num_sequences == 0:
            self.keeper.empty(self.at_step)
            return NOTHING, math.nan, self.engine.get_lr()[0]
        (losses, sums, drift), grad_norm, learning_rate = self.optimize(work, work.num_sequences, work.num_tokens)
        lengths = [group.lengths[i] for batch in work.batches for group, i in batch.sequences]
        result = dict(zip(SUMS, sums.sum(0).tolist(), strict=True))
        result["loss"] = float(losses.sum())
        result["scored_tokens"] = float(sum(lengths))
        result["sampler_drift_max"] = float(drift.max())
        return result, grad_norm, learning_rate


def _step_seed(seed: int, step: int) -> int:
    """A 63-bit seed of the step's sampling; neighbouring steps and seeds share nothing."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
