"""A GRPO step: sample completions, reward them, compute advantages, score log-probs, update.

All prompts of a step are rolled out at once. That is exact, because the weights do not change inside a step.
Shapes: G completions per prompt; this rank's share of a step has S sequences (completions) with N tokens.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from vtfast.config import Config
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
from vtfast.training import loop
from vtfast.training.groups import SampledGroup, ScoredGroup, score_completions, with_advantages
from vtfast.training.grpo_objective import GRPOObjective, loss_spec
from vtfast.training.health import warn_out_of_bounds
from vtfast.training.load_balancing import StepBatches
from vtfast.training.loop import StepResult
from vtfast.training.metrics import Timer, UpdateSums, completion_rows, grpo_metrics, summary
from vtfast.training.preflight import check_start
from vtfast.training.setup import build_session, load_policy
from vtfast.training.speed import Roofline


class Experience(NamedTuple):
    """The completions of a batch, ready to train on; `num_iterations` steps use them."""

    groups: list[ScoredGroup]
    """Sampled on this rank."""
    batches: StepBatches
    """What this rank trains on."""


class Trainer:
    """GRPO. Construction raises UserError for bad input and leaves nothing behind on disk."""

    method = "GRPO"

    def __init__(self, config: Config) -> None:
        check_start(config)
        self.config = config
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
        loaded = load_policy(config)
        self.reference = ReferenceModel(loaded.policy, config.offload_reference) if config.beta > 0 else None
        self.objective = GRPOObjective(
            loaded.policy, loss_spec(config), config.vllm_importance_sampling_correction, config.sparse_tau
        )
        self.session = build_session(loaded, self.objective, method=self.method, steps_per_batch=config.num_iterations)
        self.response_prefix = response_prefix(loaded.prompt_builder.template)
        self.roofline = Roofline(config, loaded.policy, loaded.ranks)
        self.experience: Experience | None = None
        """Completions of the newest batch."""

    def run(self) -> Path:
        """Train to the end; returns the run folder."""
        try:
            return loop.run(self)
        finally:
            self.scorer.close()

    def step(self, step: int, batch: Sequence[EncodedSample] | None) -> StepResult:
        """One optimizer step. Collective.

        `batch`: this rank's prompts; None: reuse the completions of the step before (`num_iterations` > 1)."""
        session, config, skipped = self.session, self.config, 0
        timer, start = Timer("time/rollout", "time/score", "time/update"), time.perf_counter()
        with session.policy.cache_image_features():
            if batch is not None:
                with timer.phase("time/rollout"):
                    sampled = self.sample(batch, step)
                    rewards = score_completions(
                        sampled, self.scorer, self.response_prefix, progress=session.ranks.is_main
                    )
                    session.check_stop_requested()
                    skipped = session.skip_log.flush(session.ranks, session.folder)
                with timer.phase("time/score"):
                    weights = config.reward_weights or [1.0] * len(config.reward_funcs)
                    groups = with_advantages(sampled, rewards, weights, config.scale_rewards, session.ranks)
                    batches = self.score_logprobs(self.balance(groups, step), step)
                self.experience = Experience(groups, batches)
            assert self.experience is not None, "the first step has a batch"
            groups, batches = self.experience
            with timer.phase("time/update"):
                update = self.update(batches, step)
            self.experience = Experience(groups, update.batches)
        timer.seconds["time/step"] = time.perf_counter() - start

        rollout_seconds = {} if batch is None else session.rollout_engine.last_timings
        metrics = grpo_metrics(
            session, step, groups, update, config.reward_funcs, skipped, timer.seconds, rollout_seconds
        )
        warn_out_of_bounds(session.health, step, metrics, config)
        metrics |= self.roofline.metrics(step, groups, metrics)
        rows = [] if batch is None else completion_rows(step, groups, config.reward_funcs, session.ranks)
        return StepResult(metrics, rows)

    def sample(self, batch: Sequence[EncodedSample], step: int) -> list[SampledGroup]:
        """G completions for each prompt. Prompts and groups that cannot be trained on go to the skip log."""
        session, config = self.session, self.config
        batch = [encoded for encoded in batch if session.can_train_on(encoded, [], step)]
        try:
            completions = session.rollout_engine.generate(
                [encoded.prompt for encoded in batch],
                config.num_generations,
                self.sampling,
                seed=_step_seed(config.seed, step),
                progress=session.ranks.is_main,
            )
        except RolloutCancelled:  # `check_stop_requested` in `step` raises next
            return []
        groups = []
        for encoded, members in zip(batch, completions, strict=True):
            if not session.can_train_on(encoded, [completion.tokens for completion in members], step):
                continue
            if not all(math.isfinite(x) for completion in members for x in completion.logprobs):
                session.skip_log.add(encoded.sample, "the sampler's log-probs are not finite", step)
                continue
            texts = [self.response_prefix + session.processor.decode(completion.tokens) for completion in members]
            groups.append(SampledGroup(encoded, members, texts))
        return groups

    def balance(self, groups: Sequence[ScoredGroup], step: int) -> StepBatches:
        """What this rank trains on. With beta = 0, groups whose advantages are all 0 are skipped: their gradient is
        0."""
        return self.session.balance(groups, step, skip_without_signal=self.config.beta == 0)

    def score_logprobs(self, batches: StepBatches, step: int) -> StepBatches:
        """Store the log-probs of the reference model for the KL, and of the policy if it is updated more than once;
        the batches as they fit the memory."""
        if self.reference:
            batches = self._score(self.reference.policy, "reference", batches, step)
        if self.config.num_iterations > 1:
            batches = self._score(lambda: nullcontext(self.session.policy), "old", batches, step)
        return batches

    def _score(
        self, load: Callable[[], AbstractContextManager[Policy]], model: str, batches: StepBatches, step: int
    ) -> StepBatches:
        """`load`: gives the model to score with; its weights may have to be copied to the device first."""
        budget = self.session.budget

        @torch.no_grad()
        def score(batches: StepBatches) -> None:
            with budget.agree_on_oom(), load() as policy:
                for micro_batch in batches.micro_batches:
                    watchdog.beat()
                    if micro_batch.parts:
                        logprobs = packed_logprobs(policy, micro_batch.pack, self.config.temperature)
                        micro_batch.set_logprobs(model, logprobs)

        return budget.fit(batches, step, score)[1]

    def update(self, batches: StepBatches, step: int) -> UpdateSums:
        """Forward (`GRPOObjective.forward`), backward and optimizer step. Collective."""
        updater = self.session.updater
        if batches.num_sequences == 0:
            nothing = dict.fromkeys((*self.objective.sums, "loss", "scored_tokens", "sampler_drift_max"), 0.0)
            return UpdateSums(nothing, math.nan, updater.skip_empty(step), batches)
        outputs, grad_norm, learning_rate, batches = updater.update(
            step, batches, batches.num_sequences, batches.num_tokens
        )
        losses, sums, mismatch = outputs
        lengths = [group.lengths[i] for micro_batch in batches.micro_batches for group, i in micro_batch.sequences]
        result = dict(zip(self.objective.sums, sums.sum(0).tolist(), strict=True))
        result |= {"loss": float(losses.sum()), "scored_tokens": float(sum(lengths))}
        result |= {"sampler_drift_max": float(mismatch.max())}
        return UpdateSums(result, grad_norm, learning_rate, batches)

    def summary(self, metrics: Mapping[str, float | None]) -> str:
        return summary(metrics)

    def draw_curves(self, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
        draw_curves(self.session.folder, before, after)

    def completion_for_rewards(self, completion: str) -> str:
        return completion


def _step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for the sampling of a step; different steps and seeds give independent ones."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
