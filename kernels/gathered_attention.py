"""`paged_attention` in PyTorch, for the CPU: the pages of a step are gathered and become batched matmuls.

Shapes: R rows, H query heads, K key heads, d head size, B pages in the pool.
"""

import torch

from .page_table import GatherPlan, Pages, PrefixCache


def _own_tokens(pool: torch.Tensor, plan: GatherPlan) -> torch.Tensor:
    """Return [R, own tokens, K, d]; a view of the pool if rows lie at equal distances."""
    _, page_size, K, d = pool.shape
    tokens = plan.own_pages * page_size
    if not plan.own_stride:
        return pool.index_select(0, plan.own).view(-1, tokens, K, d)
    R, elements = len(plan.own) // plan.own_pages, page_size * K * d
    stride = (plan.own_stride * elements, K * d, d, 1)
    return pool.as_strided((R, tokens, K, d), stride, pool.storage_offset() + plan.first_own * elements)


def _shared_tokens(
    keys: torch.Tensor, values: torch.Tensor, plan: GatherPlan, prefix_cache: PrefixCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [num_groups, shared tokens, K, d], from `prefix_cache` if they are in there."""
    if prefix_cache is not None and keys.data_ptr() in prefix_cache:
        return prefix_cache[keys.data_ptr()]
    shared_k, shared_v = (
        x.index_select(0, plan.shared).view(plan.num_groups, -1, *x.shape[2:]) for x in (keys, values)
    )
    if prefix_cache is not None:
        prefix_cache[keys.data_ptr()] = shared_k, shared_v
    return shared_k, shared_v


def attend_gathered(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float
) -> torch.Tensor:
    """Return [R, H, d]: scores against the shared and the own pages side by side under one softmax."""
    plan = pages.gather_plan
    H, K = query.shape[1], keys.shape[2]
    rep, shared_len = H // K, plan.shared_pages * keys.shape[1]
    padded_rows = plan.num_groups * plan.rows_per_group
    own_k, own_v = _own_tokens(keys, plan), _own_tokens(values, plan)
    if shared_len:
        shared_k, shared_v = _shared_tokens(keys, values, plan, pages.prefix_cache)

    def by_group(x: torch.Tensor) -> torch.Tensor:
        """[R, rep, ...] -> [num_groups, rows_per_group * rep, ...]"""
        if not plan.equal_groups:
            x = x.new_zeros(padded_rows, *x.shape[1:]).index_copy_(0, plan.padded_row, x)
        return x.reshape(plan.num_groups, plan.rows_per_group * rep, -1)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        """The inverse of `by_group`."""
        x = x.view(padded_rows, rep, -1)
        return x if plan.equal_groups else x.index_select(0, plan.padded_row)

    query, out = query * scale, torch.empty_like(query)
    for head in range(K):  # slices of one key head are matrices as they lie in memory
        heads = slice(head * rep, (head + 1) * rep)
        q = query[:, heads]
        scores = torch.bmm(q, own_k[:, :, head].transpose(1, 2))
        if shared_len:
            shared_scores = torch.bmm(by_group(q), shared_k[:, :, head].transpose(1, 2))
            scores = torch.cat([by_row(shared_scores), scores], dim=-1)
        weight = scores.float().add_(plan.bias).softmax(-1).to(query.dtype)
        result = torch.bmm(weight[..., shared_len:], own_v[:, :, head])
        if shared_len:
            result += by_row(torch.bmm(by_group(weight[..., :shared_len]), shared_v[:, :, head]))
        out[:, heads] = result
    return out
