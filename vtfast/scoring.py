"""Log-probabilities of completions under a policy: packed rows, and only completion tokens meet the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from vtfast_kernels.linear_logprob import linear_logprob

from vtfast.cost.micro_batches import bin_pack, split_group
from vtfast.data.prompt import Prompt
from vtfast.model.packing import Completions, Pack, check_group
from vtfast.model.policy import Policy
from vtfast.utils.errors import UserError


def packed_logprobs(policy: Policy, pack: Pack, temperature: float = 1.0) -> list[Tensor]:
    """log p of each sequence's tokens: fp32 [its tokens]. Differentiable."""
    hidden = pack.select(policy.hidden_states(pack))
    logp = linear_logprob(hidden, policy.head, pack.target, temperature=temperature)
    return list(logp.split(pack.lengths))


def completion_logprobs(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Completions,
    *,
    temperature: float = 1.0,
    token_budget: int | None = None,
) -> list[list[Tensor]]:
    """log p(token | prompt, tokens before it) at `temperature`: `result[p][g]` is fp32 [tokens of sample g].

    Every prompt runs once for its completions, every image once. `token_budget` cuts the work into several rows of
    at most so many tokens; it changes nothing but the memory. Differentiable unless called under `torch.no_grad()`.
    Raises UserError, naming the prompt, for what `check_group` refuses.
    """
    if len(prompts) != len(completions):
        raise UserError(f"completions: {len(completions)} groups for {len(prompts)} prompts")
    scores: list[list[Tensor | None]] = [[None] * len(group) for group in completions]
    parts = []
    for number, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        try:
            check_group(prompt, group, vocabulary=policy.head.shape[0])
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
        if group:
            lengths = [len(tokens) for tokens in group]
            total = len(prompt.ids) + sum(lengths)
            parts += split_group(number, len(prompt.ids), lengths, total, token_budget or total)
    if not parts:
        return scores
    budget = token_budget or sum(part.tokens for part in parts)
    for (bin_,) in bin_pack(parts, budget):
        pack = policy.pack(
            [prompts[part.group] for part in bin_],
            [[completions[part.group][i] for i in part.members] for part in bin_],
        )
        found = iter(packed_logprobs(policy, pack, temperature))
        for part in bin_:
            for i in part.members:
                scores[part.group][i] = next(found)
    return scores
