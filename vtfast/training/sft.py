"""Supervised fine-tuning on GRPO's packed path: a sample is a group of one whose answer is given.

Packing, the ranks' shares of the work, ZeRO-2, LoRA, freezing and checkpoints are GRPO's. The loss is the mean negative
log-prob of all target tokens of the optimizer step, whatever rank and pass they are in.

Shapes: T tokens of a packed row, N target tokens, D hidden size, P prompt tokens.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from vtfast_kernels.linear_logprob import linear_logprob
from vtfast_kernels.linear_sample import linear_sample

from vtfast.config import SFTConfig
from vtfast.cost.devices import mfu
from vtfast.data import Sample
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_builder import EncodedSample
from vtfast.evaluate.held_out import HeldOutScores
from vtfast.model.packing import IGNORED, Pack
from vtfast.model.policy import Policy
from vtfast.model.row_gather import RowGather
from vtfast.rollout import Completion
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.grpo_objective import blank_pack
from vtfast.training.load_balancing import StepBatches
from vtfast.training.loop import Run
from vtfast.training.metrics import Timer, process_metrics, update_flops
from vtfast.training.preflight import check_start
from vtfast.training.sft_target import Target, load_target

log = logging.getLogger("vtfast")

NOT_TEXT = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
"""Tokens of a prompt that are no targets, even where the prompt's text is."""


class SFTObjective(nn.Module):
    """One pass: trunk over the packed row, then head and log-probs in one op that never holds the logits."""

    def __init__(self, policy: Policy, not_text: Tensor | None = None) -> None:
        """`not_text`: train on the prompts as well, but for these ids; None: on the completions alone."""
        super().__init__()
        self.module = policy.module
        self.policy, self.not_text = policy, not_text

    def forward(self, batch: MicroBatch, num_targets: int) -> tuple[Tensor, Tensor]:
        """-> (loss, [2] fp32: targets that are the most likely token, and entropy; summed over the targets).

        `num_targets`: those of the whole step, all passes and ranks. A rank with nothing to do in this pass takes part
        with zeros: it has the same collectives as the others."""
        pack = batch.pack if batch.parts else blank_pack(self.policy)
        trunk = self.policy.hidden_states(pack)
        hidden, target = pack.select(trunk), pack.target
        if self.not_text is not None:
            rows, ids = prompt_targets(pack, self.not_text)
            hidden, target = torch.cat([hidden, rows(trunk)]), torch.cat([target, ids])
        if not batch.parts:
            target = torch.full_like(target, IGNORED)
        logp, entropy = linear_logprob(hidden, self.policy.head, target, entropy=True)
        sums = torch.stack([(self._likeliest(hidden) == target).sum(), entropy.sum()])
        return -logp.sum() / num_targets, sums.detach()

    @torch.no_grad()
    def _likeliest(self, hidden: Tensor) -> Tensor:
        """The most likely token behind each state [N, D] -> [N]."""
        unused = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        settings = {"seed": 0, "row_key": unused, "position": unused, "greedy": True}
        return linear_sample(hidden, self.policy.head, **settings)[0]


def text_targets(prompt: Prompt, not_text: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a prompt that are targets: (positions that predict them, from 0; their ids). Nothing predicts the
    first one."""
    positions = torch.nonzero(~torch.isin(prompt.ids[1:], not_text)).squeeze(1)
    return positions, prompt.ids[positions + 1]


def prompt_targets(pack: Pack, not_text: Tensor) -> tuple[RowGather, Tensor]:
    """Those of a packed row whose prompts have one completion each: (hidden states [T, D] -> those that predict them,
    their ids)."""
    rows, targets, start = [], [], 0
    for prompt, completion in zip(pack.prompts, pack.lengths, strict=True):
        positions, ids = text_targets(prompt, not_text)
        rows.append(start + positions)
        targets.append(ids)
        start += len(prompt.ids) + completion
    device = pack.target.device
    return RowGather(torch.cat(rows), pack.tokens, device), torch.cat(targets).to(device)


class SFTTrainer(Run):
    """Construction raises UserError for bad input and leaves nothing behind on disk."""

    config: SFTConfig
    method = "SFT"

    def __init__(self, config: SFTConfig) -> None:
        check_start(config)
        self.target_text = load_target(config.target)
        super().__init__(config)

    def objective(self) -> SFTObjective:
        self.target = Target(self.target_text, self.asker.template, self.processor)
        stop_at(self.target.end, self.policy, self.processor)
        ids = self.processor.tokenizer.convert_tokens_to_ids(list(NOT_TEXT))
        self.not_text = None if self.config.completion_only_loss else torch.tensor(ids)
        return SFTObjective(self.policy, self.not_text)

    def max_steps(self) -> int:
        config = self.config
        if config.max_steps is not None:
            return config.max_steps
        steps = config.num_train_epochs * len(self.train_samples) / self.prompts_per_step
        return math.ceil(steps - 1e-9)  # 2.2 * 25 is a little more than 55

    def trainable(self, samples: list[Sample]) -> list[Sample]:
        """Those whose target fits into max_completion_length."""
        return self.asker.sound(samples, self.config.data, self._misfit)

    def _misfit(self, sample: Sample) -> str | None:
        length, limit = len(self.target.tokens(sample)), self.config.max_completion_length
        if length <= limit:
            return None
        return f"the target has {length} tokens and --max_completion_length is {limit}"

    def step(self, step: int, questions: Sequence[EncodedSample]) -> tuple[dict, list[dict]]:
        """One optimizer step -> (metrics over all ranks, no completions). Collective. `questions`: this rank's."""
        timer, began, self.at_step = Timer(), time.perf_counter(), step
        with timer.phase("time/pack"):
            groups = self.with_targets(questions, step)
            skipped = self.settle_skipped()
            num_targets = sum(self.ranks.gather(sum(map(self.count_targets, groups))))
            work = self.share_out(groups)
        with timer.phase("time/update"):
            sums, grad_norm, learning_rate = self.update(work, num_targets)
        seconds = time.perf_counter() - began

        parts = [(batch.groups[part.group], part) for batch in work.batches for part in batch.parts]
        tokens = sum(part.tokens for _, part in parts)
        everyone = self.ranks.gather((*sums, tokens))
        loss, correct, entropy, num_tokens = map(sum, zip(*everyone, strict=True))
        prompt_text = sum(self.count_targets(group) - group.lengths[0] for group, _ in parts)
        flops = update_flops(self.policy, work.batches, prompt_text, vision_cached=False)
        return {
            "step": step,
            "epoch": step * self.prompts_per_step / len(self.train_samples),
            "loss": loss if num_targets else None,
            "mean_token_accuracy": correct / num_targets if num_targets else None,
            "entropy": entropy / num_targets if num_targets else None,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_tokens": num_tokens,
            "num_targets": num_targets,
            "skipped_samples": skipped,
            "passes": len(work.batches),
            **timer.seconds,
            "time/step": seconds,
            "tokens_per_second": num_tokens / seconds,
            "mfu": mfu(flops, timer.seconds["time/update"], self.ranks.device),
            **self.keeper.health.metrics(),
            "token_budget": self.budget.tokens,
            **process_metrics(self.ranks.device),
        }, []

    def update(self, work: StepBatches, num_targets: int) -> tuple[list[float], float, float]:
        """Forward, backward and the optimizer step -> ([loss, likeliest targets, entropy], summed over this rank's
        targets; gradient norm; learning rate)."""
        if num_targets == 0:
            self.keeper.empty(self.at_step)
            return [0.0, 0.0, 0.0], math.nan, self.engine.get_lr()[0]
        (losses, sums), grad_norm, learning_rate = self.optimize(work, num_targets)
        return [float(losses.sum()), *sums.sum(0).tolist()], grad_norm, learning_rate

    def with_targets(self, questions: Sequence[EncodedSample], step: int) -> list[Group]:
        """Groups of one. Samples that cannot be trained on are left out and listed."""
        groups = []
        for question in questions:
            tokens = self.target.tokens(question.sample)
            if self.usable(question, [tokens], step):
                given = Completion(tokens, logprobs=[], finish_reason="stop")
                groups.append(Group(question, [given], advantage=torch.ones(1)))
        return groups

    def count_targets(self, group: Group) -> int:
        """Target tokens of a group of one."""
        (count,) = group.lengths
        if self.not_text is not None:
            count += len(text_targets(group.question.prompt, self.not_text)[1])
        return count

    def graded(self, response: str) -> str:
        """A bare answer as the rewards expect one."""
        if self.target.is_bare and "<answer>" not in response:
            return f"<think></think><answer>{response}</answer>"
        return response

    def summary(self, metrics: Mapping[str, float | None]) -> str:
        if metrics["loss"] is None:
            return "no sample could be used"
        accuracy, speed = metrics["mean_token_accuracy"], metrics["tokens_per_second"]
        return f"loss {metrics['loss']:.3f}, token accuracy {accuracy:.2f}, {speed:.0f} tok/s"

    def draw(self, before: HeldOutScores | None, after: HeldOutScores | None) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
        titles = {"loss": "Loss (nats a token)", "mean_token_accuracy": "Token accuracy"}
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            axis.plot([line["step"] for line in steps], [line[key] for line in steps])
            axis.set(title=title, xlabel="step", ylim=(0, None))
        figure.savefig(self.folder / "curves.png", dpi=110)
        plt.close(figure)


def stop_at(token: int, policy: Policy, processor: Processor) -> None:
    """Let `token` end responses, here and in the checkpoints: a base model's end mark need not be that of a chat."""
    if token in policy.eos_ids:
        return
    log.info("responses also end with token %d from now on", token)
    policy.eos_ids = (*policy.eos_ids, token)
    policy.module.generation_config.eos_token_id = list(policy.eos_ids)
    processor.eos_ids = list(policy.eos_ids)
