"""Groups -> packed rows: `[prompt_1, c_11 ... c_1G, prompt_2, c_21 ...]`, no padding, every prompt once.

The row is cut into attention segments (`attention.Layout`): a prompt sees itself, a completion sees its prompt and
itself. Completion token j stands at the prompt's largest M-RoPE position + 1 + j. The hidden state before a token
predicts it, so a prompt's last one is picked once for each of its completions.

Shapes: T tokens of a row, N scored tokens, S sequences (completions).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtfast.data.prompt import Prompt
from vtfast.model.attention import Layout
from vtfast.model.row_gather import RowGather
from vtfast.utils.errors import UserError

Completions = Sequence[Sequence[Sequence[int]]]
"""Token ids: completions[p][g] are those of sample g of prompt p."""
IGNORED = -100
"""Target of a token that is not scored, as in the kernels."""


def check_group(
    prompt: Prompt, completions: Sequence[Sequence[int]], vocabulary: int, limit: int | None = None, merge: int = 2
) -> None:
    """Raises UserError for what cannot be scored: a prompt longer than `limit`, images that do not match their
    placeholders, a completion without tokens or with an id outside the vocabulary."""
    if len(prompt.ids) == 0:
        raise UserError("the prompt is empty")
    if limit is not None and len(prompt.ids) > limit:
        raise UserError(f"the prompt has {len(prompt.ids)} tokens, the limit is {limit}")
    if int(prompt.ids.min()) < 0 or int(prompt.ids.max()) >= vocabulary:
        raise UserError("the prompt has ids outside the vocabulary")
    features = [] if prompt.grid is None else (prompt.grid.prod(-1) // merge**2).tolist()
    places = _runs(prompt.image_mask)
    if places != features:
        raise UserError(
            f"the prompt has places for {_listed(places)} image tokens, its images make {_listed(features)}"
        )
    patches = 0 if prompt.pixels is None else len(prompt.pixels)
    if patches != sum(features) * merge**2:
        raise UserError(f"the images have {patches} patches, their sizes ask for {sum(features) * merge**2}")
    for tokens in completions:
        if len(tokens) == 0:
            raise UserError("a completion has no tokens")
        ids = torch.as_tensor(tokens)
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise UserError("a completion has ids outside the vocabulary")


def _runs(mask: Tensor | None) -> list[int]:
    """Lengths of the runs of true in [P] bool: one an image, since its marks stand around each."""
    if mask is None:
        return []
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff()
    return (torch.nonzero(edges < 0) - torch.nonzero(edges > 0)).flatten().tolist()


def _listed(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers)) if numbers else "0"


class Pack:
    """One packed row as tensors on `device`."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        completions: Completions,
        *,
        backend: str = "sdpa",
        device: torch.device | str = "cpu",
    ) -> None:
        """Groups that have passed `check_group`."""
        self.prompts = list(prompts)
        ids, positions, text_positions, images, select, targets = [], [], [], [], [], []
        lengths: list[int] = []
        keys: list[list[tuple[int, int]]] = []
        row = 0
        for prompt, group in zip(prompts, completions, strict=True):
            answers = [torch.as_tensor(tokens, dtype=torch.int64) for tokens in group]
            P = len(prompt.ids)
            prompt_span, row_after = (row, row + P), row + P
            ids.append(prompt.ids)
            positions.append(prompt.positions)
            text_positions.append(torch.arange(P))
            if prompt.image_mask is not None:
                images.append(row + torch.nonzero(prompt.image_mask).squeeze(1))
            lengths.append(P)
            keys.append([prompt_span])
            first = int(prompt.positions.max()) + 1
            for answer in answers:
                steps = torch.arange(len(answer))
                ids.append(answer)
                positions.append((first + steps).expand(3, -1))
                text_positions.append(P + steps)
                # The prompt's last token predicts the first one, every token its successor.
                select.append(torch.cat([torch.tensor([prompt_span[1] - 1]), row_after + steps[:-1]]))
                targets.append(answer)
                lengths.append(len(answer))
                keys.append([prompt_span, (row_after, row_after + len(answer))])
                row_after += len(answer)
            row = row_after
        self.tokens = row
        self.ids = torch.cat(ids).to(device)
        """[T]; at image places the placeholder's id, whose embedding is overwritten."""
        self.image_index = (torch.cat(images) if images else torch.empty(0, dtype=torch.int64)).to(device)
        """Rows that image features go to, in the order of prompts and images."""
        self.positions = torch.cat([torch.cat(text_positions)[None], torch.cat(positions, dim=1)]).to(device)[:, None]
        """[4, 1, T]: place in its own sequence, then M-RoPE's time, height and width."""
        self.select = RowGather(torch.cat(select) if select else torch.empty(0, dtype=torch.int64), row, device)
        """Hidden states [T, D] -> those that predict the scored tokens [N, D]."""
        self.lengths = [len(target) for target in targets]
        """Tokens of each sequence."""
        self.target = (torch.cat(targets) if targets else torch.empty(0, dtype=torch.int64)).to(device)
        self.sequence_id = torch.repeat_interleave(
            torch.arange(len(targets)), torch.tensor(self.lengths, dtype=torch.int64)
        ).to(device)
        self.layout = Layout(lengths, keys, backend=backend, device=device)
