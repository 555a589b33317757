"""Computes all rewards of a step: quick ones in this process, the others in a pool of worker processes."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from vtfast.data import Sample
from vtfast.distributed import watchdog
from vtfast.rewards import get_reward, strict, visualthinker
from vtfast.rewards.reward import RewardInput, RewardResult, call_reward
from vtfast.rewards.worker_pool import WorkerPool

log = logging.getLogger("vtfast")


class RewardManager:
    """Scores responses with several rewards. A score does not depend on where its reward runs.

    A job goes to the pool if the reward is the user's own, or if it may run math-verify on a completion: accuracy for
    open questions, and in recipe mode for answers that math-verify can parse. The others are string comparisons, which
    take less time than sending them to another process. So the demo and SAT's static questions in strict mode start no
    process.

    In the pool, built-in rewards get the sample without its images; a user's function gets all of it, the images
    encoded, and decoded when the function reads them.
    """

    def __init__(self, names: Sequence[str], mode: str = "strict", *, workers: int = 0, timeout: float = 10.0) -> None:
        """`workers`: the largest number of processes; 0 scores everything in this process, without a time limit.

        Raises UserError for a reward that cannot be found.
        """
        self.names, self.mode = list(names), mode
        self.rewards = [get_reward(name, mode) for name in names]
        self.pool = WorkerPool(names, mode, workers, timeout) if workers else None

    def score(self, responses: Sequence[RewardInput], progress: bool = False) -> list[list[RewardResult]]:
        """result[reward][response], in the order of `names` and of `responses`."""
        table: list[list[RewardResult]] = []
        jobs, cells = [], []
        for row, (name, reward) in enumerate(zip(self.names, self.rewards, strict=True)):
            table.append([])
            for column, response in enumerate(responses):
                watchdog.beat()
                if self.pool and self._needs_pool(name, response.sample):
                    jobs.append((name, response if ":" in name else _without_images(response)))
                    cells.append((row, column))
                    table[row].append(RewardResult(0.0))
                else:
                    table[row].append(call_reward(reward, response))
        scores = self.pool.run(jobs, progress) if self.pool and jobs else []
        for (row, column), score in zip(cells, scores, strict=True):
            table[row][column] = score
        self._warn(table)
        return table

    def close(self) -> None:
        """End the processes, if there are any."""
        if self.pool:
            self.pool.close()

    def _needs_pool(self, name: str, sample: Sample) -> bool:
        if name != "accuracy":
            return ":" in name
        if self.mode == "recipe":
            return visualthinker.may_use_math_verify(sample)
        return strict.has_math_answer(sample)

    def _warn(self, table: list[list[RewardResult]]) -> None:
        for name, scores in zip(self.names, table, strict=True):
            if scores and all(score.failure for score in scores):
                log.warning(
                    "--reward_funcs %s: failed for all %d completions, which count as 0: %s",
                    name,
                    len(scores),
                    scores[0].failure,
                )


def _without_images(response: RewardInput) -> RewardInput:
    return replace(response, sample=replace(response.sample, images=[]))
