"""Log-probabilities of completions under a policy: one padded forward, and only completion tokens meet the vocabulary.

Shapes: B rows (one per completion), L padded length, N completion tokens in all, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vtfast_kernels.linear_logprob import linear_logprob

from vtfast.errors import UserError
from vtfast.model import Policy
from vtfast.processor import Prompt

Completions = Sequence[Sequence[Sequence[int]]]
"""Token ids: completions[p][g] are those of sample g of prompt p."""


def completion_hidden(
    policy: Policy, prompts: Sequence[Prompt], completions: Completions
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict each completion token.

    Returns (hidden [N, D], target [N] int64, sequence_id [N] int64), tokens in the order of `completions`. Images are
    encoded once a prompt. Raises UserError for a completion without tokens.
    """
    if len(prompts) != len(completions):
        raise UserError(f"completions: {len(completions)} groups for {len(prompts)} prompts")
    rows, positions, starts, targets = [], [], [], []
    for number, (prompt, embedding, group) in enumerate(
        zip(prompts, policy.embed_prompts(prompts), completions, strict=True)
    ):
        first = int(prompt.positions.max()) + 1
        for tokens in group:
            if len(tokens) == 0:
                raise UserError(f"prompt {number}: a completion has no tokens")
            ids = torch.as_tensor(tokens, dtype=torch.int64)
            if int(ids.min()) < 0 or int(ids.max()) >= policy.head.shape[0]:
                raise UserError(f"prompt {number}: a completion has ids outside the vocabulary")
            rows.append(torch.cat([embedding, policy.embed(ids.to(policy.device))]))
            later = first + torch.arange(len(ids)).expand(3, -1)
            positions.append(torch.cat([prompt.positions, later], dim=1).T)
            starts.append(len(prompt.ids))
            targets.append(ids)
    # Padding stands on the right, where the causal mask alone keeps every real token from seeing it.
    hidden = policy.language_model(
        inputs_embeds=pad_sequence(rows, batch_first=True),
        position_ids=pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(policy.device),
        attention_mask=None,
        use_cache=False,
    ).last_hidden_state
    lengths = torch.tensor([len(target) for target in targets])
    sequence_id = torch.repeat_interleave(torch.arange(len(targets)), lengths)
    offset = torch.cat(
        [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    )
    selected = hidden[sequence_id.to(policy.device), (offset - 1).to(policy.device)]
    return selected, torch.cat(targets).to(policy.device), sequence_id.to(policy.device)


def completion_logprobs(
    policy: Policy, prompts: Sequence[Prompt], completions: Completions, *, temperature: float = 1.0
) -> list[list[Tensor]]:
    """log p(token | prompt, tokens before it) at `temperature`: result[p][g] is fp32 [tokens of sample g].

    Differentiable unless called under `torch.no_grad()`.
    """
    if not any(len(group) for group in completions):
        return [[] for _ in completions]
    hidden, target, _ = completion_hidden(policy, prompts, completions)
    logp = linear_logprob(hidden, policy.head, target, temperature=temperature)
    parts = iter(logp.split([len(tokens) for group in completions for tokens in group]))
    return [[next(parts) for _ in group] for group in completions]
