"""Groups -> packed rows: `[prompt_1, c_11 ... c_1G, prompt_2, c_21 ...]`, no padding, every prompt once.

The row is cut into attention segments (`AttentionLayout`): a prompt sees itself, a completion sees its prompt and
itself. The M-RoPE position of completion token j is the prompt's largest position + 1 + j. The hidden state before a
token predicts it, so a prompt's last hidden state is gathered once for each of its completions.

Shapes: T tokens of a row, N scored tokens, S sequences (completions), P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtfast.data.prompt import Prompt
from vtfast.model.attention_layout import AttentionLayout
from vtfast.model.row_gather import RowGather
from vtfast.utils.errors import UserError

Completions = Sequence[Sequence[Sequence[int]]]
"""Token ids: completions[p][g] are those of sample g of prompt p."""
MERGE = 2
"""Side of the square of patches that becomes one image token, in every supported family."""


def check_group(
    prompt: Prompt, completions: Sequence[Sequence[int]], vocabulary: int, limit: int | None = None
) -> None:
    """Raises UserError for what cannot be scored: a prompt longer than `limit`, images that do not match their
    placeholders, a completion without tokens or with an id outside the vocabulary."""
    features = [] if prompt.grid is None else (prompt.grid.prod(-1) // MERGE**2).tolist()
    patches = 0 if prompt.pixels is None else len(prompt.pixels)
    placeholders = _run_lengths(prompt.image_mask)
    problem = None
    if len(prompt.ids) == 0:
        problem = "the prompt is empty"
    elif limit is not None and len(prompt.ids) > limit:
        problem = f"the prompt has {len(prompt.ids)} tokens, the limit is {limit}"
    elif not _in_vocabulary(prompt.ids, vocabulary):
        problem = "the prompt has ids outside the vocabulary"
    elif placeholders != features:
        problem = (
            f"the prompt has placeholders for {_joined(placeholders)} image tokens, its images make {_joined(features)}"
        )
    elif patches != sum(features) * MERGE**2:
        problem = f"the images have {patches} patches, their sizes require {sum(features) * MERGE**2}"
    elif not all(map(len, completions)):
        problem = "a completion has no tokens"
    elif not all(_in_vocabulary(torch.as_tensor(tokens), vocabulary) for tokens in completions):
        problem = "a completion has ids outside the vocabulary"
    if problem is not None:
        raise UserError(problem)


def _in_vocabulary(ids: Tensor, vocabulary: int) -> bool:
    return int(ids.min()) >= 0 and int(ids.max()) < vocabulary


def _run_lengths(mask: Tensor | None) -> list[int]:
    """Lengths of the runs of true in [P] bool: one per image, since markers surround each image."""
    if mask is None:
        return []
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff()
    return (torch.nonzero(edges < 0) - torch.nonzero(edges > 0)).flatten().tolist()


def _joined(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers)) if numbers else "0"


class Pack:
    """Groups as one packed row of tensors on `device`."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        completions: Completions,
        *,
        backend: str = "sdpa",
        device: torch.device | str = "cpu",
    ) -> None:
        """`completions[p]`: those of prompt p, maybe none. The groups have passed `check_group`."""
        self.prompts = list(prompts)
        ids, positions, text_positions, images, predictors, targets = [], [], [], [], [], []
        lengths: list[int] = []
        keys: list[list[tuple[int, int]]] = []
        row = 0
        for prompt, group in zip(prompts, completions, strict=True):
            P = len(prompt.ids)
            prompt_span = (row, row + P)
            ids.append(prompt.ids)
            positions.append(prompt.positions)
            text_positions.append(torch.arange(P))
            if prompt.image_mask is not None:
                images.append(row + torch.nonzero(prompt.image_mask).squeeze(1))
            lengths.append(P)
            keys.append([prompt_span])
            row += P
            first_position = int(prompt.positions.max()) + 1
            for completion in group:
                target = torch.as_tensor(completion, dtype=torch.int64)
                steps = torch.arange(len(target))
                ids.append(target)
                positions.append((first_position + steps).expand(3, -1))
                text_positions.append(P + steps)
                # The prompt's last token predicts the first one, every token its successor.
                predictors.append(torch.cat([torch.tensor([prompt_span[1] - 1]), row + steps[:-1]]))
                targets.append(target)
                lengths.append(len(target))
                keys.append([prompt_span, (row, row + len(target))])
                row += len(target)
        self.num_tokens = row
        self.ids = torch.cat(ids).to(device)
        """[T]; image tokens have the placeholder's id, whose embedding is overwritten."""
        self.image_index = _cat(images).to(device)
        """Rows that receive image features, in the order of prompts and images."""
        self.positions = torch.cat([torch.cat(text_positions)[None], torch.cat(positions, dim=1)]).to(device)[:, None]
        """[4, 1, T]: position in its own sequence, then M-RoPE's time, height and width."""
        self.gather_predictors = RowGather(_cat(predictors), row, device)
        """Maps hidden states [T, D] to those that predict the scored tokens [N, D]."""
        self.lengths = [len(target) for target in targets]
        """Number of tokens of each sequence."""
        self.target = _cat(targets).to(device)
        """[N]: ids of the scored tokens."""
        self.sequence_id = torch.repeat_interleave(
            torch.arange(len(targets)), torch.tensor(self.lengths, dtype=torch.int64)
        ).to(device)
        """[N]: sequence of each scored token."""
        self.layout = AttentionLayout(lengths, keys, backend=backend, device=device)


def _cat(indices: Sequence[Tensor]) -> Tensor:
    """Concatenate; an empty list gives an empty int64 tensor."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *indices])
