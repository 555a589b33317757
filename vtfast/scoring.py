"""Log-probabilities of completions under a policy, from packed rows: every prompt runs once for all of its completions,
and only completion tokens meet the vocabulary.

    policy = load_model("Qwen/Qwen2-VL-2B")
    prompt = Processor.from_pretrained("Qwen/Qwen2-VL-2B").encode(text, images)
    logprobs = completion_logprobs(policy, [prompt], [[[5, 6], [7]]])  # logprobs[0][1]: fp32 [1]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from vtfast_kernels.linear_logprob import linear_logprob

from vtfast.cost.micro_batches import GroupPart, bin_pack, split_group
from vtfast.data.prompt import Prompt
from vtfast.model.packing import Completions, Pack, check_group
from vtfast.model.policy import Policy
from vtfast.utils.errors import error_prefix


def packed_logprobs(policy: Policy, pack: Pack, temperature: float = 1.0) -> list[Tensor]:
    """log p of the tokens of each sequence: fp32 [tokens]. Differentiable."""
    hidden = pack.gather_predictors(policy.hidden_states(pack))
    logp = linear_logprob(hidden, policy.head, pack.target, temperature=temperature)
    assert isinstance(logp, Tensor)  # a tuple only with the entropy
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
    at most so many tokens; it changes only the memory. Differentiable unless called under `torch.no_grad()`.
    Raises UserError, with the number of the prompt, for what `check_group` refuses.
    """
    parts = _split_groups(policy, prompts, completions, token_budget)
    budget = token_budget or sum(part.tokens for part in parts)
    logprobs: dict[tuple[int, int], Tensor] = {}
    for (row,) in bin_pack(parts, budget) if parts else []:
        pack = policy.pack(
            [prompts[part.group] for part in row],
            [[completions[part.group][member] for member in part.members] for part in row],
        )
        sequences = [(part.group, member) for part in row for member in part.members]
        logprobs |= zip(sequences, packed_logprobs(policy, pack, temperature), strict=True)
    return [[logprobs[p, g] for g in range(len(group))] for p, group in enumerate(completions)]


def _split_groups(
    policy: Policy, prompts: Sequence[Prompt], completions: Completions, token_budget: int | None
) -> list[GroupPart]:
    """Groups that have completions, each split into parts of at most `token_budget` tokens."""
    parts: list[GroupPart] = []
    for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        with error_prefix(f"prompt {p}"):
            check_group(prompt, group, vocabulary=policy.head.shape[0])
        if group:
            lengths = [len(tokens) for tokens in group]
            total = len(prompt.ids) + sum(lengths)
            parts += split_group(p, len(prompt.ids), lengths, total, token_budget or total)
    return parts
