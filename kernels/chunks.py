"""How many tokens' logits exist at once, and where a batch is cut.

Shapes: N tokens, V vocabulary, D hidden.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

CPU_CHUNK_BYTES = 1 << 26  # of fp32 logits at a time: small problems run as one chunk
CUDA_CHUNK_BYTES = 1 << 30  # with the fp32 d_weight of a 152k x 1,536 head this stays below 2.3 GB
TILE_ROWS, TILE_COLUMNS = 128, 256  # of d_hidden, which one multiprocessor of a Hopper GPU works on
H100_PROCESSORS = 132  # where the GPU is not known yet: in an estimate


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return H100_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def chunk_rows(
    num_rows: int, vocab_size: int, hidden_size: int, itemsize: int, device_type: str, processors: int = H100_PROCESSORS
) -> int:
    """Return the rows whose logits exist at once. `itemsize`: bytes of a weight; `processors`: of the GPU.

    On CUDA as many as make d_hidden's tiles whole waves of the GPU. Where one exceeds the budget, and on the CPU: equal
    chunks within the budget, so that none is a small rest. At least 32, below which reading and writing d_weight would
    cost more than a chunk's matmul."""
    budget, step = CPU_CHUNK_BYTES, 1
    if device_type == "cuda":
        budget, step = CUDA_CHUNK_BYTES, TILE_ROWS
    else:
        itemsize = 4  # the CPU path computes in fp32
    most = max(32, budget // (itemsize * vocab_size))
    wave = TILE_ROWS * (processors // triton.cdiv(hidden_size, TILE_COLUMNS))
    if device_type == "cuda" and 0 < wave <= most:
        return min(wave * (most // wave), max(num_rows, 1))
    step = step if most >= step else 1
    most -= most % step
    even = triton.cdiv(num_rows, max(1, triton.cdiv(num_rows, most)))
    return min(max(1, triton.cdiv(even, step) * step), max(num_rows, 1))


def chunk_rows_of(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Return `chunk_rows` of a head [V, D] for these tokens [N, D]."""
    (V, D), device = weight.shape, weight.device
    return chunk_rows(len(hidden), V, D, weight.element_size(), device.type, multiprocessors(device))


def row_spans(N: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + rows, N)) for start in range(0, N, rows))


def sequence_spans(sequence_id: torch.Tensor, rows: int) -> list[tuple[int, int]] | None:
    """Return chunks of at most `rows` tokens that hold whole sequences; None if a sequence is longer."""
    N = len(sequence_id)
    if rows >= N:
        return list(row_spans(N, rows))
    ends = [*(torch.nonzero(sequence_id[1:] != sequence_id[:-1])[:, 0] + 1).tolist(), N]
    spans, start, end = [], 0, 0
    for next_end in ends:
        if next_end - start > rows:
            if end > start:
                spans.append((start, end))
                start = end
            if next_end - start > rows:
                return None
        end = next_end
    return [*spans, (start, end)]


@triton.jit
def work_item(item, row_blocks, num_splits, GROUP: tl.constexpr):
    """Return the row block and the split of a work item. Neighbours share a split, so that its 12 MB of weights are
    read from L2; GROUP row blocks go through all splits before the next ones."""
    first = item // (GROUP * num_splits) * GROUP
    group = min(row_blocks - first, GROUP)
    place = item - first * num_splits
    return first + place % group, place // group
