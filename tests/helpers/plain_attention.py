"""Plain softmax attention over packed rows, one segment at a time: the oracle of every backend."""

import torch

H, K, D = 6, 2, 8
# Two groups: a prompt of 5 with completions of 1, 3 and 7, and a prompt of 1 with one of 4.
LENGTHS = [5, 1, 3, 7, 1, 4]
KEYS = [[(0, 5)], [(0, 5), (5, 6)], [(0, 5), (6, 9)], [(0, 5), (9, 16)], [(16, 17)], [(16, 17), (17, 21)]]


def plain(query, key, value, lengths, keys, causal=True, window=None):
    """softmax(q k / sqrt d) v of one segment after the other; the last query sees the last key."""
    outputs, row = [], 0
    for length, spans in zip(lengths, keys, strict=True):
        seen = torch.cat([torch.arange(*span) for span in spans])
        q = query[row : row + length]
        k, v = (x[seen].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        place = torch.arange(len(seen) - length, len(seen))[:, None]
        hidden = torch.zeros(length, len(seen), dtype=torch.bool)
        if causal:
            hidden |= torch.arange(len(seen)) > place
        if window is not None:
            hidden |= torch.arange(len(seen)) <= place - window
        weight = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weight, v))
        row += length
    return torch.cat(outputs)


def rows(total, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, heads, D, generator=generator, dtype=dtype).requires_grad_() for heads in (H, K, K)]
