"""Accuracy and format on held-out questions by kind of question: sampled at the training temperature, without top-k,
top-p, min-p or repetition penalty, and greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from vtfast.config import RunConfig
from vtfast.data import Sample
from vtfast.data.prompt_builder import PromptBuilder
from vtfast.data.prompt_templates import response_prefix
from vtfast.distributed.ranks import Ranks
from vtfast.rewards import accuracy_reward, format_reward
from vtfast.rollout import Sampling
from vtfast.rollout.engine_factory import Engine

BATCH = 32
SEED = 2**31 - 1
"""Seed of the sampled completions; no training step uses it."""


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
    builder: PromptBuilder,
    samples: Sequence[Sample],
    config: RunConfig,
    ranks: Ranks,
    to_reward_text: Callable[[str], str] = str,
) -> HeldOutScores:
    """Accuracy and format of one sampled and one greedy completion per sample; the ranks share the samples.

    `to_reward_text` turns a response into the text that the rewards read."""
    share = samples[ranks.rank :: ranks.size]
    prefix = response_prefix(builder.template)
    results: dict[str, list[tuple[str, float, float]]] = {"sampled": [], "greedy": []}
    bar = tqdm(total=len(share), desc="held-out", unit="question", leave=False, disable=not ranks.is_main)
    for start in range(0, len(share), BATCH):
        questions = [builder.build(sample) for sample in share[start : start + BATCH]]
        for mode, rows in results.items():
            sampling = Sampling(config.temperature, config.max_completion_length, greedy=mode == "greedy")
            completions = engine.generate([question.prompt for question in questions], 1, sampling, seed=SEED)
            for question, (completion,) in zip(questions, completions, strict=True):
                text, sample = to_reward_text(prefix + builder.processor.decode(completion.tokens)), question.sample
                rows.append((sample.kind, accuracy_reward(text, sample), format_reward(text, sample)))
        bar.update(len(questions))
    bar.close()
    all_ranks = ranks.gather(results)
    scores = {mode: _by_kind([row for part in all_ranks for row in part[mode]]) for mode in results}
    return HeldOutScores(scores, len(samples))


def _by_kind(rows: Sequence[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    groups = {"all": list(rows)}
    for row in sorted(rows):
        groups.setdefault(row[0], []).append(row)
    return {
        kind: (sum(r[1] for r in group) / len(group), sum(r[2] for r in group) / len(group))
        for kind, group in groups.items()
    }
