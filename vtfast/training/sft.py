"""A step of supervised fine-tuning: a sample is a group of one, whose completion is the target.

Packing, balancing, ZeRO-2, LoRA, freezing and checkpoints are the same as for GRPO. The loss is the mean negative
log-prob of the target tokens of all micro-batches and ranks of the step.

Shapes: T tokens of a packed row, N target tokens, D hidden size, P prompt tokens.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from vtfast_kernels.checks import IGNORE_INDEX
from vtfast_kernels.linear_logprob import linear_logprob
from vtfast_kernels.linear_sample import linear_sample

from vtfast.config import SFTConfig
from vtfast.data import Sample
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_builder import EncodedSample
from vtfast.evaluate.held_out import HeldOutScores
from vtfast.model.packing import Pack
from vtfast.model.policy import Policy
from vtfast.model.row_gather import RowGather
from vtfast.rollout import Completion
from vtfast.training import loop
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.grpo_objective import shortest_pack
from vtfast.training.load_balancing import StepBatches
from vtfast.training.loop import StepResult
from vtfast.training.metrics import Timer, UpdateSums, update_flops, update_metrics
from vtfast.training.preflight import check_start
from vtfast.training.setup import build_session, load_policy
from vtfast.training.sft_target import Target, load_target

log = logging.getLogger("vtfast")

IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
"""Tokens of a prompt that are never targets."""


class SFTObjective(nn.Module):
    """The trunk over a packed micro-batch, then head and log-probs in one op that never holds the logits."""

    def __init__(self, policy: Policy, not_text: Tensor | None = None) -> None:
        """`not_text`: ids [any] of prompts that are not targets; None trains on the completions alone."""
        super().__init__()
        self.module = policy.module
        self.policy, self.not_text = policy, not_text

    def forward(self, micro_batch: MicroBatch, num_targets: int) -> tuple[Tensor, Tensor]:
        """The loss, and [2] fp32 summed over the targets: whether it is the most likely token, and the entropy.

        `num_targets`: of all micro-batches and ranks of the step. A rank without sequences in this micro-batch adds
        zeros, so that it has the same collectives as the others."""
        pack = micro_batch.pack if micro_batch.parts else shortest_pack(self.policy)
        hidden_states = self.policy.hidden_states(pack)
        hidden, target = pack.gather_predictors(hidden_states), pack.target
        if self.not_text is not None:
            rows, ids = prompt_targets(pack, self.not_text)
            hidden, target = torch.cat([hidden, rows(hidden_states)]), torch.cat([target, ids])
        if not micro_batch.parts:
            target = torch.full_like(target, IGNORE_INDEX)
        logp, entropy = linear_logprob(hidden, self.policy.head, target, entropy=True)
        sums = torch.stack([(self._most_likely(hidden) == target).sum(), entropy.sum()])
        return -logp.sum() / num_targets, sums.detach()

    @torch.no_grad()
    def _most_likely(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N], the token with the highest logit."""
        unused = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        token, _ = linear_sample(hidden, self.policy.head, seed=0, row_key=unused, position=unused, greedy=True)
        return token


def text_targets(prompt: Prompt, not_text: Tensor) -> tuple[Tensor, Tensor]:
    """Targets among a prompt's tokens: the positions [n] that predict them, and their ids [n]. The first token is
    never a target."""
    positions = torch.nonzero(~torch.isin(prompt.ids[1:], not_text)).squeeze(1)
    return positions, prompt.ids[positions + 1]


def prompt_targets(pack: Pack, not_text: Tensor) -> tuple[RowGather, Tensor]:
    """Targets among the prompts of a pack with one completion per prompt: the gather [T, D] -> [n, D] of the hidden
    states that predict them, and their ids [n]."""
    rows, targets, start = [], [], 0
    for prompt, completion in zip(pack.prompts, pack.lengths, strict=True):
        positions, ids = text_targets(prompt, not_text)
        rows.append(start + positions)
        targets.append(ids)
        start += len(prompt.ids) + completion
    device = pack.target.device
    return RowGather(torch.cat(rows), pack.num_tokens, device), torch.cat(targets).to(device)


class SFTTrainer:
    """Supervised fine-tuning. Construction raises UserError for bad input and leaves nothing behind on disk."""

    method = "SFT"

    def __init__(self, config: SFTConfig) -> None:
        check_start(config)
        self.config = config
        text = load_target(config.target)
        loaded = load_policy(config)
        self.target = Target(text, loaded.prompt_builder.template, loaded.processor)
        add_end_token(self.target.end, loaded.policy, loaded.processor)
        ids = loaded.processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
        self.not_text = None if config.completion_only_loss else torch.tensor(ids)
        objective = SFTObjective(loaded.policy, self.not_text)
        self.session = build_session(loaded, objective, method=self.method, problem_of=self.target_problem)

    def run(self) -> Path:
        """Train to the end; returns the run folder."""
        return loop.run(self)

    def target_problem(self, sample: Sample) -> str | None:
        length, limit = len(self.target.tokens(sample)), self.config.max_completion_length
        if length <= limit:
            return None
        return f"the target has {length} tokens and --max_completion_length is {limit}"

    def step(self, step: int, batch: Sequence[EncodedSample] | None) -> StepResult:
        """One optimizer step. Collective. `batch`: of this rank; never None, as every step has its own."""
        assert batch is not None
        session, ranks = self.session, self.session.ranks
        timer, start = Timer("time/pack", "time/update"), time.perf_counter()
        with timer.phase("time/pack"):
            groups = self.with_targets(batch, step)
            skipped = session.skip_log.flush(ranks, session.folder)
            num_targets = sum(ranks.gather(sum(map(self.count_targets, groups))))
            batches = session.balance(groups, step)
        with timer.phase("time/update"):
            update = self.update(batches, step, num_targets)
        timer.seconds["time/step"] = time.perf_counter() - start

        parts = [
            (micro_batch.groups[part.group], part)
            for micro_batch in update.batches.micro_batches
            for part in micro_batch.parts
        ]
        tokens = sum(part.tokens for _, part in parts)
        sums = [update.sums[name] for name in ("loss", "correct", "entropy")]
        loss, correct, entropy, num_tokens = map(sum, zip(*ranks.gather((*sums, tokens)), strict=True))
        prompt_targets = sum(self.count_targets(group) - group.lengths[0] for group, _ in parts)
        flops = update_flops(session.policy, update.batches.micro_batches, prompt_targets, vision_cached=False)
        metrics: dict[str, float | None] = {
            "step": step,
            "epoch": step * session.prompts_per_step / len(session.train_samples),
            "loss": loss if num_targets else None,
            "mean_token_accuracy": correct / num_targets if num_targets else None,
            "entropy": entropy / num_targets if num_targets else None,
            "num_tokens": num_tokens,
            "num_targets": num_targets,
            **update_metrics(session, update, skipped, timer.seconds, num_tokens, flops),
        }
        return StepResult(metrics, [])

    def with_targets(self, batch: Sequence[EncodedSample], step: int) -> list[Group]:
        """Groups of one. Samples that cannot be trained on go to the skip log."""
        groups = []
        for encoded in batch:
            tokens = self.target.tokens(encoded.sample)
            if self.session.can_train_on(encoded, [tokens], step):
                completion = Completion(tokens, logprobs=[], finish_reason="stop")
                groups.append(Group(encoded, [completion], advantage=torch.ones(1)))
        return groups

    def count_targets(self, group: Group) -> int:
        """Target tokens of a group of one."""
        (count,) = group.lengths
        if self.not_text is not None:
            count += len(text_targets(group.prompt, self.not_text)[1])
        return count

    def update(self, batches: StepBatches, step: int, num_targets: int) -> UpdateSums:
        """Forward, backward and optimizer step. Collective."""
        updater = self.session.updater
        if num_targets == 0:
            nothing = dict.fromkeys(("loss", "correct", "entropy"), 0.0)
            return UpdateSums(nothing, math.nan, updater.skip_empty(step), batches)
        (losses, sums), grad_norm, learning_rate, batches = updater.update(step, batches, num_targets)
        correct, entropy = sums.sum(0).tolist()
        result = {"loss": float(losses.sum()), "correct": correct, "entropy": entropy}
        return UpdateSums(result, grad_norm, learning_rate, batches)

    def summary(self, metrics: Mapping[str, float | None]) -> str:
        if metrics["loss"] is None:
            return "no sample could be used"
        accuracy, speed = metrics["mean_token_accuracy"], metrics["tokens_per_second"]
        return f"loss {metrics['loss']:.3f}, token accuracy {accuracy:.2f}, {speed:.0f} tok/s"

    def draw_curves(self, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        lines = (self.session.folder / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
        titles = {"loss": "Loss (nats a token)", "mean_token_accuracy": "Token accuracy"}
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            axis.plot([line["step"] for line in steps], [line[key] for line in steps])
            axis.set(title=title, xlabel="step", ylim=(0, None))
        figure.savefig(self.session.folder / "curves.png", dpi=110)
        plt.close(figure)

    def completion_for_rewards(self, completion: str) -> str:
        """A bare answer gets the tags that the rewards expect."""
        if self.target.is_bare and "<answer>" not in completion:
            return f"<think></think><answer>{completion}</answer>"
        return completion


def add_end_token(token: int, policy: Policy, processor: Processor) -> None:
    """Let `token` end completions, in this run and in its checkpoints. A chat template may end differently from the
    base model's texts."""
    if token in policy.eos_ids:
        return
    log.info("completions also end with token %d from now on", token)
    policy.eos_ids = (*policy.eos_ids, token)
    policy.module.generation_config.eos_token_id = list(policy.eos_ids)
    processor.eos_ids = list(policy.eos_ids)
