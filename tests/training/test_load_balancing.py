"""Sharing groups out over ranks, with threads for ranks: what every rank ends up training on."""

import threading
from types import SimpleNamespace

import pytest
import torch

from vtfast.cost import micro_batches
from vtfast.cost.flops import forward_flops
from vtfast.cost.micro_batches import GroupPart
from vtfast.data.prompt_builder import EncodedSample
from vtfast.rollout import Completion
from vtfast.training.groups import Group
from vtfast.training.load_balancing import assign_to_ranks, balance


class ThreadRanks:
    """The collectives of `distributed.Ranks` between threads of one process."""

    def __init__(self, rank, size, boxes, barrier):
        self.rank, self.size, self.boxes, self.barrier = rank, size, boxes, barrier

    def gather(self, value):
        self.boxes[self.rank] = value
        self.barrier.wait(timeout=30)
        values = list(self.boxes)
        self.barrier.wait(timeout=30)
        return values


def on_ranks(size, work):
    """[work(ranks) of every rank]"""
    boxes, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        results[rank] = work(ThreadRanks(rank, size, boxes, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results
    return results


def group(prompts, index, lengths, advantage=1.0):
    completions = [Completion([10 + index] * n, [0.0] * n, "stop") for n in lengths]
    values = torch.full((len(lengths),), advantage)
    question = EncodedSample(None, prompts[index % len(prompts)], index)
    return Group(question, completions, advantage=values)


# Lengths of the completions that each of three ranks sampled: one has nearly all of the work, one has none.
SAMPLED = [[[90, 80], [70, 60], [50, 40], [30]], [[5, 5]], []]


@pytest.fixture
def shared(policy, prompts):
    def build(token_budget=4000, skip=True, dull=()):
        asked = []

        def work(ranks):
            first = sum(len(part) for part in SAMPLED[: ranks.rank])
            groups = [
                group(prompts, first + i, lengths, 0.0 if first + i in dull else 1.0)
                for i, lengths in enumerate(SAMPLED[ranks.rank])
            ]

            def ask(index):
                asked.append((ranks.rank, index))
                return EncodedSample(None, prompts[index % len(prompts)], index)

            return balance(groups, ranks, policy, ask, token_budget, skip)

        return on_ranks(3, work), asked

    return build


def cost(policy, batch):
    return sum(
        forward_flops(
            policy.module.config,
            len(group.prompt.ids),
            [group.lengths[i] for i in part.members],
            [] if group.prompt.grid is None else group.prompt.grid.prod(-1).tolist(),
        ).total
        for part in batch.parts
        for group in [batch.groups[part.group]]
    )


@pytest.mark.parametrize("token_budget", [4000, 200, 120])
def test_every_completion_is_trained_on_once(shared, token_budget):
    works, asked = shared(token_budget)
    lengths = [n for part in SAMPLED for group in part for n in group]
    seen = [
        (group.encoded.index, i, tuple(group.tokens[i]))
        for work in works
        for batch in work.micro_batches
        for group, i in batch.sequences
    ]
    assert len(seen) == len(set(seen)) == len(lengths)
    assert sorted(len(tokens) for *_, tokens in seen) == sorted(lengths)
    assert all(set(tokens) == {10 + index} for index, _, tokens in seen), "tokens of its question"
    assert len({len(work.micro_batches) for work in works}) == 1, "as many passes on every rank"
    assert {(w.num_sequences, w.num_tokens) for w in works} == {(len(lengths), sum(lengths))}
    for rank, index in asked:  # a question is asked again only where it did not start
        assert index not in range(*((0, 4), (4, 5), (5, 5))[rank])


def test_no_rank_waits(shared, policy):
    works, _ = shared()
    loads = [cost(policy, work.micro_batches[0]) for work in works]
    assert max(loads) < 1.25 * sum(loads) / 3


def test_images_count_as_work(shared, monkeypatch):
    patches, original = [], micro_batches.forward_flops

    def watched(config, prompt, lengths, images):
        patches.extend(images)
        return original(config, prompt, lengths, images)

    monkeypatch.setattr(micro_batches, "forward_flops", watched)
    shared()
    assert patches and min(patches) > 0


def test_groups_without_signal_stay_out(shared):
    works, _ = shared(dull=(0, 2, 4))
    assert {work.skipped for work in works} == {3 / 5}
    trained = {g.encoded.index for w in works for b in w.micro_batches for g, _ in b.sequences}
    assert trained == {1, 3}
    assert sum(not batch.parts for work in works for batch in work.micro_batches) == 1, "an idle rank"
    works, _ = shared(dull=(0, 2, 4), skip=False)
    assert {work.skipped for work in works} == {0}


def test_settling_keeps_work_at_home():
    parts = [GroupPart(i, (0,), tokens, float(tokens)) for i, tokens in enumerate([10, 20, 30, 5])]
    bins = [[parts[2]], [parts[0], parts[3]], [parts[1]]]
    assert assign_to_ranks(bins, owners=[2, 0, 1, 1]) == [[parts[1]], [parts[2]], [parts[0], parts[3]]]


def test_one_rank_keeps_its_groups(policy, prompts):
    mine = [group(prompts, i, [3, 4]) for i in range(3)]
    ranks = SimpleNamespace(rank=0, size=1, gather=lambda value: [value])
    work = balance(mine, ranks, policy, None, 1000, True)
    (batch,) = work.micro_batches
    assert {id(g) for g, _ in batch.sequences} == {id(g) for g in mine}
