"""A question, its G answers, and what became of them: the unit that the trainer moves around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vtfast.questions import Question
from vtfast.rollout import Completion


@dataclass
class Group:
    """One question with its G answers and what became of them. Lists and tensors run over the G."""

    question: Question
    completions: list[Completion]
    texts: list[str]
    rewards: Tensor
    """[reward functions, G], unweighted."""
    total: Tensor | None = None
    """Weighted sum of the rewards [G]."""
    advantage: Tensor | None = None
    reference: list[Tensor] | None = None
    """Log-probs of each answer under the reference model; None without KL."""

    @property
    def tokens(self) -> list[list[int]]:
        return [completion.tokens for completion in self.completions]


def completion_rows(step: int, groups: Sequence[Group], reward_names: Sequence[str]) -> list[dict]:
    return [
        {
            "step": step,
            "row": group.question.sample.row,
            "kind": group.question.sample.kind,
            "question": group.question.sample.question,
            "answer": group.question.sample.answer,
            "completion": text,
            "reward": float(group.total[g]),
            "rewards": {name: float(group.rewards[i, g]) for i, name in enumerate(reward_names)},
            "advantage": float(group.advantage[g]),
            "length": len(group.completions[g].tokens),
            "finish_reason": group.completions[g].finish_reason,
        }
        for group in groups
        for g, text in enumerate(group.texts)
    ]
