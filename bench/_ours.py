"""Our contestant of `bench step`: `vtfast.trainer.Trainer` as `vtfast train` builds it, on its own prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from bench._phases import Phases
from bench._task import BETA, MAX_PIXELS, Task
from vtfast.config import load_config
from vtfast.data.batches import batches
from vtfast.rollout import Completion
from vtfast.trainer import Trainer


class Ours:
    """A step is what `Run.run` does for one: take the next questions (encoded while the step before ran), and step."""

    def __init__(self, task: Task, phases: Phases) -> None:
        self.phases, prompts = phases, len(task.questions)
        settings = {
            "model": str(task.checkpoint),
            "data": str(task.folder / "questions.jsonl"),
            "template": str(task.folder / "template.txt"),
            "eval_data": None,
            "device": task.device,
            "dtype": str(task.dtype).removeprefix("torch."),
            "cpu_threads": task.threads,
            "max_pixels": MAX_PIXELS,
            "num_generations": task.shape.G,
            "max_completion_length": task.shape.completion,
            "per_device_train_batch_size": prompts,
            "beta": BETA,
            "reward_funcs": ["bench._task:variety"],
            "reward_workers": 0,
            "learning_rate": task.optimizer.learning_rate,
            "adam_epsilon": task.optimizer.adam_epsilon,
            "max_grad_norm": task.optimizer.max_grad_norm,
            "lr_scheduler_type": "constant",
            "sampler_drift_warning": 1e9,  # given completions were not sampled
            "warmup_steps": 0,
            "output_dir": str(task.folder / f"ours-{id(self)}"),
            "report_to": ["none"],
        }
        self.trainer = trainer = Trainer(load_config("tiny-spatial", overrides=settings))
        trainer.session.policy.eos_ids = ()  # the end token does not end a completion: lengths are fixed
        self.module = trainer.session.policy.module
        if task.completions:
            given = dict(zip(map(task.text, range(prompts)), task.completions, strict=True))
            trainer.session.rollout_engine = FixedCompletions(given)
        self.numbers = itertools.count(1)
        session = trainer.session
        self.questions = batches(
            session.prompt_builder, session.skip_log, session.train_samples, range(1, 1_000_000), per_rank=prompts
        )
        phases.watch(trainer.session.rollout_engine, "generate", "rollout")
        phases.watch(trainer.scorer, "score", "rewards")
        phases.watch(trainer, "score_logprobs", "reference")
        phases.watch(trainer, "update", "update")
        phases.watch(trainer.session.engine, "step", "optimizer")

    def step(self) -> None:
        with self.phases.step():
            with self.phases.phase("data"):
                asked = next(self.questions)
            self.trainer.step(next(self.numbers), asked)

    def close(self) -> None:
        self.questions.close()
        self.trainer.scorer.close()


class FixedCompletions:
    """An engine that returns given completions, by the prompt's text."""

    last_timings: ClassVar[dict[str, float]] = {}  # no separate times of prefill and decode

    def __init__(self, completions: dict[str, Sequence[Sequence[int]]]) -> None:
        self.completions = completions
        self.last_timings: dict[str, float] = {}
        self.should_cancel = None

    def generate(self, prompts, num_generations=1, *_, **__) -> list[list[Completion]]:
        return [
            [Completion(list(ids), [0.0] * len(ids), "length") for ids in self.completions[prompt.text]]
            for prompt in prompts
        ]
