"""Inputs of attention over pages: rows of several groups, pages anywhere in the pool, unused memory poisoned."""

import torch
from vtfast_kernels.page_table import Pages

H, K, D, PAGE = 6, 2, 8, 16


def case(shared, lengths, dtype=torch.float32, seed=0, pages=60, page_size=PAGE):
    """`shared[g]` pages and the lengths of each of its rows; unused pages and places hold NaN and any valid page."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(pages, generator=generator).tolist()
    n = max(-(-length // page_size) for rows in lengths for length in rows) + 1
    table, group, taken = [], [], set()
    for g, (count, rows) in enumerate(zip(shared, lengths, strict=True)):
        prefix = [free.pop() for _ in range(count)]
        for length in rows:
            own = [free.pop() for _ in range(-(-length // page_size) - count)]
            taken |= {*prefix, *own}
            row = prefix + own
            table.append(row + [row[0]] * (n - len(row)))
            group.append(g)
    keys, values = (torch.full((pages, page_size, K, D), torch.nan, dtype=dtype) for _ in range(2))
    for x in (keys, values):
        x[sorted(taken)] = torch.randn(len(taken), page_size, K, D, generator=generator).to(dtype)
    flat = [length for rows in lengths for length in rows]
    return {
        "query": torch.randn(len(flat), H, D, generator=generator).to(dtype),
        "keys": keys,
        "values": values,
        "pages": Pages(
            torch.tensor(table, dtype=torch.int32),
            torch.tensor(flat, dtype=torch.int32),
            torch.tensor(group, dtype=torch.int32),
            torch.tensor([shared[g] for g in group], dtype=torch.int32),
            page_size,
        ),
    }


def exactly(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


CASES = {
    "equal groups": ([2, 2], [[33, 48, 40], [36, 64, 43]]),
    "unequal groups": ([3, 1, 0], [[49, 48], [18, 36, 22, 16], [1]]),
    "nothing shared": ([0, 0], [[1, 16], [26, 20]]),
    "a row that ends with its shared pages": ([2], [[32, 35]]),
    "one row": ([1], [[17]]),
}
