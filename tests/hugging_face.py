"""A prompt in the words of Hugging Face's own forward and generate: the oracle of scoring and rollout."""

import torch

from vtfast.processor import Prompt


def inputs(prompt: Prompt, tokens: list[int] | tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Arguments of `Qwen2VLForConditionalGeneration` for one prompt followed by completion `tokens`."""
    ids = torch.cat([prompt.ids, torch.tensor(tokens, dtype=torch.int64)])[None]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pixels is None:
        return arguments
    kinds = torch.zeros_like(ids)
    kinds[0, : len(prompt.ids)] = prompt.image_mask.long()
    images = {
        "pixel_values": prompt.pixels,
        "image_grid_thw": prompt.grid,
        "mm_token_type_ids": kinds,
    }
    return arguments | images
