"""The settings of each kind of run, put together from the sections of `fields.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import Field, ValidationError

from vtfast.config import rules
from vtfast.config.fields import GRPO, SFT, Optimizer, Output, Rollout, Task
from vtfast.config.problems import Problem, SettingsError
from vtfast.config.section import problem_from_pydantic


class Settings(Output, Optimizer, Rollout, Task):
    """The sections that both kinds of run share. pydantic orders fields from the last base, Task, to the first."""

    def __init__(self, **values: Any) -> None:
        """`values` may be text, as on the command line. Raises SettingsError, which names every problem."""
        problems: list[Problem] = []
        try:
            super().__init__(**values)
        except ValidationError as error:
            order = list(values)
            errors = sorted(error.errors(include_url=False), key=lambda one: order.index(str(one["loc"][0])))
            problems = [problem_from_pydantic(one, type(self)) for one in errors]
            refused = {name for problem in problems for name in problem.fields}
            super().__init__(**{name: value for name, value in values.items() if name not in refused})
        refused = {name for problem in problems for name in problem.fields}
        # A rule about a refused value would judge the default that stands in for it.
        problems += [problem for problem in self._broken_rules() if refused.isdisjoint(problem.fields)]
        if problems:
            raise SettingsError(problems)

    def _broken_rules(self) -> Iterator[Problem]:
        yield from rules.check_lora(self)
        yield from rules.check_image_size(self)
        yield from rules.check_sampler(self)
        yield from rules.check_reproducibility(self, self)

    @property
    def prompts_per_rank(self) -> int:
        """Of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def warnings(self) -> list[str]:
        """Settings that are accepted and probably not meant."""
        return list(rules.find_warnings(self, self))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


class Config(Settings, GRPO, Task):
    """Settings of a GRPO run."""

    max_steps: int = Field(default=200, ge=1)
    """Optimizer steps."""

    def _broken_rules(self) -> Iterator[Problem]:
        yield from super()._broken_rules()
        yield from rules.check_reward_timeout(self, self)
        yield from rules.check_reward_weights(self)
        yield from rules.check_reference(self, self)
        yield from rules.check_loss(self)
        yield from rules.check_sampler_correction(self)

    @property
    def tokens_per_micro_batch(self) -> int:
        """`token_budget`, or what `per_device_train_batch_size` full groups would fill."""
        group = self.max_prompt_length + self.num_generations * self.max_completion_length
        return self.token_budget or self.per_device_train_batch_size * group


class SFTConfig(Settings, SFT, Task):
    """Settings of a supervised run."""

    recipe: str = "tiny-spatial-sft"
    """Name of the recipe that these settings started from."""
    learning_rate: float = Field(default=2e-5, ge=0)
    """Peak learning rate of AdamW."""

    @property
    def tokens_per_micro_batch(self) -> int:
        """`token_budget`, or what `per_device_train_batch_size` of the longest samples would fill."""
        longest = self.max_prompt_length + self.max_completion_length
        return self.token_budget or self.per_device_train_batch_size * longest


RunConfig = Config | SFTConfig
