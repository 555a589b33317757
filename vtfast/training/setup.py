"""Builds a training run from its settings. A build that fails leaves nothing behind on disk.

A trainer calls `load_policy`, makes its objective around the policy, and calls `build_session` with it.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from vtfast.config import RunConfig, SFTConfig
from vtfast.cost.memory import estimate_memory
from vtfast.cost.verdict import Device, find_device, verdict
from vtfast.data import Sample
from vtfast.data.processor import Processor
from vtfast.data.prompt_builder import EncodedSample, PromptBuilder
from vtfast.data.skip_log import SkipLog
from vtfast.data.splits import load_splits, render_synthetic, samples_digest
from vtfast.distributed import init
from vtfast.distributed.determinism import seed_all
from vtfast.distributed.ranks import Ranks
from vtfast.distributed.zero2 import zero2_engine
from vtfast.evaluate.held_out import HeldOutScores
from vtfast.model.adapters import add_lora
from vtfast.model.fingerprint import base_model_fingerprint
from vtfast.model.liger import use_liger
from vtfast.model.loading import load_model
from vtfast.model.packing import check_group
from vtfast.model.policy import Policy
from vtfast.rollout.engine_factory import Engine, build_engine
from vtfast.training.checkpoint import find_checkpoint, keep_data, prepare_run_folder
from vtfast.training.checkpoint.checkpointer import Checkpointer
from vtfast.training.checkpoint.find import Checkpoint
from vtfast.training.checkpoint.resume import Identity, restore
from vtfast.training.groups import Group
from vtfast.training.health import GuardedOptimizer, Health
from vtfast.training.load_balancing import StepBatches, balance
from vtfast.training.stopping import StopNotice
from vtfast.training.token_budget import TokenBudget
from vtfast.training.update import Updater
from vtfast.utils.errors import Stopped, UserError
from vtfast.utils.hub import model_path

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("vtfast")


@dataclass
class LoadedPolicy:
    """The model of a run before DeepSpeed wraps it, and what encodes its prompts."""

    config: RunConfig
    ranks: Ranks
    path: str
    """Path of the model folder."""
    processor: Processor
    prompt_builder: PromptBuilder
    policy: Policy
    device: Device
    """This rank's, and its memory before the model was loaded."""
    base_fingerprint: str
    """Of the weights before training, adapters and checkpoints left out."""
    checkpoint: Checkpoint | None
    """The checkpoint to resume from."""


@dataclass
class Session:
    """Everything that a training run has. One per process; collective methods say so."""

    config: RunConfig
    ranks: Ranks
    processor: Processor
    prompt_builder: PromptBuilder
    skip_log: SkipLog
    policy: Policy
    engine: DeepSpeedEngine
    rollout_engine: Engine
    train_samples: list[Sample]
    held_out_samples: list[Sample]
    folder: Path
    """The run folder."""
    max_steps: int
    steps_per_batch: int
    """Optimizer steps that use the same batch."""
    identity: Identity
    health: Health
    budget: TokenBudget
    updater: Updater
    checkpointer: Checkpointer
    stop: StopNotice
    step: int = 0
    """Optimizer steps done."""
    held_out_before: HeldOutScores | None = None
    """Held-out result from before training."""
    tracker_ids: dict[str, str] = field(default_factory=dict)
    """Ids at Weights & Biases and the like under which a resumed run continues."""

    @property
    def prompts_per_step(self) -> int:
        """Over all ranks."""
        return self.identity.prompts_per_step

    def starts_new_batch(self, step: int) -> bool:
        """Whether `step` starts with a new batch. A run can be resumed only before such a step."""
        return (step - 1) % self.steps_per_batch == 0

    def check_stop_requested(self) -> None:
        """Raises Stopped on all ranks if any of them was asked to stop. Collective; called before a step has changed
        anything."""
        received = [name for name in self.ranks.gather(self.stop.received) if name]
        if received:
            raise Stopped(received[0])

    def can_train_on(self, encoded: EncodedSample, tokens: Sequence[Sequence[int]], step: int) -> bool:
        """Whether a prompt with these completions can be trained on; the skip log gets the reason if not."""
        try:
            check_group(encoded.prompt, tokens, self.policy.head.shape[0], self.config.max_prompt_length)
        except UserError as error:
            self.skip_log.add(encoded.sample, error, step)
            return False
        return True

    def balance(self, groups: Sequence[Group], step: int, skip_without_signal: bool = False) -> StepBatches:
        """The micro-batches that this rank trains on in the steps that share a batch, from `step` on. Collective."""
        return balance(
            groups,
            self.ranks,
            self.policy,
            lambda index: self.prompt_builder.build(self.train_samples[index], index),
            self.budget.set_for_step(step + self.steps_per_batch - 1),
            skip_without_signal,
        )


def load_policy(config: RunConfig) -> LoadedPolicy:
    """Start the ranks and load the model. Collective. Raises UserError for bad input."""
    ranks = init.init_distributed(config)
    device = find_device(config)
    seed_all(config.seed)
    checkpoint = ranks.on_main(lambda: find_checkpoint(config))
    path = model_path(config.model)
    processor = Processor.from_pretrained(path, config.min_pixels, config.max_pixels)
    prompt_builder = PromptBuilder(config, processor)
    policy = load_model(path, config.dtype, str(ranks.device), config.freeze, config.attn_implementation)
    base_fingerprint = base_model_fingerprint(policy.module)
    if config.use_liger_kernel and ranks.device.type == "cuda":
        use_liger(policy)
    if config.use_peft:
        add_lora(policy, config.lora_r, config.lora_alpha, config.lora_target_modules)
    return LoadedPolicy(config, ranks, path, processor, prompt_builder, policy, device, base_fingerprint, checkpoint)


def build_session(
    loaded: LoadedPolicy,
    objective: nn.Module,
    *,
    method: str,
    steps_per_batch: int = 1,
    problem_of: Callable[[Sample], str | None] = lambda sample: None,
) -> Session:
    """Load the data, wrap the model with DeepSpeed, restore a checkpoint, make the run folder. Collective.

    Args:
        objective: (micro-batch, counts) -> (loss, tensors that `Updater` collects), around `loaded.policy`.
        method: GRPO or SFT; a checkpoint of one cannot be resumed by the other.
        problem_of: returns why a training sample cannot be used, or None. Prompt length is checked separately.

    Raises UserError for bad input.
    """
    config, ranks, policy, checkpoint = loaded.config, loaded.ranks, loaded.policy, loaded.checkpoint
    health, skip_log = Health(), SkipLog(config.on_bad_sample)
    if config.gradient_checkpointing:
        policy.module.gradient_checkpointing_enable({"use_reentrant": False})
    with tempfile.TemporaryDirectory() as scratch:
        rendered = render_synthetic(config, Path(scratch) / "data")
        samples = load_splits(config, loaded.prompt_builder, skip_log, rendered)
        train_samples = skip_log.drop_invalid(samples["train"], config.data, problem_of)
        identity = Identity(
            method=method,
            base_fingerprint=loaded.base_fingerprint,
            prompts_per_step=config.prompts_per_rank * ranks.size,
            num_samples=len(train_samples),
            samples_digest=samples_digest(train_samples),
        )
        config.max_steps = resolve_max_steps(config, len(train_samples), identity.prompts_per_step)
        engine = zero2_engine(config, objective)
        most_images = max(len(sample.images) for part in samples.values() for sample in part)
        memory = estimate_memory(policy, config, ranks.size, loaded.device.kind, loaded.device.bytes)
        if ranks.is_main and loaded.device.kind == "cuda":
            log.info("memory: %s", " ".join(verdict(memory, policy, config, loaded.device, ranks.size)))
        rollout_engine = build_engine(config, policy, loaded.processor, loaded.path, most_images, memory.cache)
        if checkpoint:
            restore(checkpoint, config, ranks, policy, engine, identity, health)
        folder = ranks.on_main(lambda: prepare_run_folder(config, checkpoint))
        ranks.on_main(lambda: keep_data(rendered, folder))
    budget = TokenBudget(
        config.tokens_per_micro_batch,
        folder,
        ranks,
        timedelta(seconds=config.ddp_timeout),
        free_cache=rollout_engine.stop_keeping_cache,
    )
    optimizer = GuardedOptimizer(engine, ranks, folder, config.max_nonfinite_steps, health)
    session = Session(
        config=config,
        ranks=ranks,
        processor=loaded.processor,
        prompt_builder=loaded.prompt_builder,
        skip_log=skip_log,
        policy=policy,
        engine=engine,
        rollout_engine=rollout_engine,
        train_samples=train_samples,
        held_out_samples=samples.get("val", []),
        folder=folder,
        max_steps=config.max_steps,
        steps_per_batch=steps_per_batch,
        identity=identity,
        health=health,
        budget=budget,
        updater=Updater(engine, ranks, budget, optimizer),
        checkpointer=Checkpointer(folder, config, ranks, policy, loaded.processor, engine, identity, health),
        stop=StopNotice(folder),
    )
    _set_start(session, checkpoint)
    return session


def _set_start(session: Session, checkpoint: Checkpoint | None) -> None:
    """Start after the checkpoint's step; without one, write the samples that were skipped at load time."""
    skipped_at_load = session.skip_log.pop()  # every rank has the same ones
    if checkpoint is None:
        if session.ranks.is_main:
            session.skip_log.write(session.folder, skipped_at_load)
        return
    state = checkpoint.state
    session.step = state.step
    session.held_out_before = state.before
    session.tracker_ids = checkpoint.trackers(session.folder)
    session.checkpointer.mark_resumed(checkpoint.folder, state.step)


def resolve_max_steps(config: RunConfig, samples: int, prompts_per_step: int) -> int:
    """`--max_steps`, or for SFT the steps of `--num_train_epochs`."""
    if config.max_steps is not None:
        return config.max_steps
    assert isinstance(config, SFTConfig)
    return math.ceil(config.num_train_epochs * samples / prompts_per_step - 1e-9)  # 2.2 * 25 is a little more than 55
