"""Accuracy and format on held-out questions by kind, sampled as in training and greedy beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from vtfast.config import RunConfig
from vtfast.data.prompt_builder import PromptBuilder
from vtfast.data.prompt_templates import response_prefix
from vtfast.distributed.ranks import Ranks
from vtfast.rewards import accuracy_reward, format_reward
from vtfast.rollout import Sampling
from vtfast.rollout.engines import Engine

BATCH = 32
SEED = 2**31 - 1
"""Seed of the sampled answers; no training step uses it."""


@dataclass(frozen=True)
class HeldOutScores:
    """`scores[mode][kind]` is (accuracy, format) in [0, 1]; mode: sampled | greedy; kind: "all" or a name."""

    scores: dict[str, dict[str, tuple[float, float]]]
    count: int

    def accuracy(self, mode: str = "sampled", kind: str = "all") -> float:
        return self.scores[mode][kind][0]

    def format(self, mode: str = "sampled", kind: str = "all") -> float:
        return self.scores[mode][kind][1]


def evaluate_held_out(
    engine: Engine,
    prompt_builder: PromptBuilder,
    samples: Sequence,
    config: RunConfig,
    ranks: Ranks,
    graded: Callable[[str], str] = str,
) -> HeldOutScores:
    """Ask every sample once sampled and once greedily; the ranks share them out.

    `graded`: a response -> what of it the rewards are shown."""
    mine = samples[ranks.rank :: ranks.size]
    prefix = response_prefix(prompt_builder.template)
    results: dict[str, list[tuple[str, float, float]]] = {"sampled": [], "greedy": []}
    bar = tqdm(total=len(mine), desc="held-out", unit="question", leave=False, disable=not ranks.is_main)
    for start in range(0, len(mine), BATCH):
        questions = [prompt_builder.build(sample) for sample in mine[start : start + BATCH]]
        for mode, rows in results.items():
            sampling = Sampling(config.temperature, config.max_completion_length, greedy=mode == "greedy")
            answers = engine.generate([question.prompt for question in questions], 1, sampling, seed=SEED)
            for question, (answer,) in zip(questions, answers, strict=True):
                text = graded(prefix + prompt_builder.processor.decode(answer.tokens))
                rows.append(
                    (question.sample.kind, accuracy_reward(text, question.sample), format_reward(text, question.sample))
                )
        bar.update(len(questions))
    bar.close()
    parts = ranks.gather(results)
    return HeldOutScores(
        {mode: _by_kind([row for part in parts for row in part[mode]]) for mode in results}, len(samples)
    )


def _by_kind(rows: Sequence[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    groups = {"all": list(rows)}
    for row in sorted(rows):
        groups.setdefault(row[0], []).append(row)
    return {
        kind: (sum(r[1] for r in group) / len(group), sum(r[2] for r in group) / len(group))
        for kind, group in groups.items()
    }
