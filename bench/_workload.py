"""The weights, prompts and completions that all contestants of a bench share, and the sizes of the benches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vtfast.data.prompt import Prompt, mrope_positions


@dataclass(frozen=True)
class Shape:
    model: str
    """A name in MODELS."""
    text: tuple[int, ...]
    """Text tokens of each prompt."""
    grids: tuple[tuple[int, int], ...]
    """Patch rows and columns of each prompt's image; an image token is four patches."""
    completion: int
    """Tokens of every completion."""
    G: int = 8

    def __str__(self) -> str:
        tokens = [n + a * b // 4 for n, (a, b) in zip(self.text, self.grids, strict=True)]
        prompts = f"{min(tokens)}" if min(tokens) == max(tokens) else f"{min(tokens)}-{max(tokens)}"
        return f"{self.model} prompts={len(tokens)}x{prompts} G={self.G} completion={self.completion}"


# "mid" has Qwen2-VL-2B's proportions of vision encoder, trunk and head at a size that a CPU trains.
# "tiny" is the demo's model.
MODELS = {
    "tiny": dict(
        text=dict(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=400,
            sections=[4, 4, 4],
        ),
        vision=dict(depth=2, embed_dim=64, num_heads=4, mlp_ratio=2),
    ),
    "mid": dict(
        text=dict(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=4096,
            sections=[8, 12, 12],
        ),
        vision=dict(depth=4, embed_dim=128, num_heads=4, mlp_ratio=4),
    ),
    "Qwen2-VL-2B": dict(
        text=dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            sections=[16, 24, 24],
        ),
        vision=dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4),
    ),
}
MID = Shape("mid", (50, 60, 70, 80), ((20, 20), (24, 24), (26, 26), (28, 28)), 64)
TINY = replace(MID, model="tiny")
TWO_B = Shape("Qwen2-VL-2B", (100, 100), ((32, 64), (32, 64)), 200)
REHEARSAL = Shape("tiny", (20, 24), ((8, 8), (12, 8)), 4, G=2)
"""Only shows that everything runs."""
SIZES = {"rehearsal": REHEARSAL, "tiny": TINY, "mid": MID, "2B": TWO_B}
"""Shapes by the names of `--sizes`."""


def model_config(name: str) -> Qwen2VLConfig:
    text, vision = MODELS[name]["text"], MODELS[name]["vision"]
    sizes = {key: value for key, value in text.items() if key != "sections"}
    V = text["vocab_size"]
    return Qwen2VLConfig(
        tie_word_embeddings=True,
        image_token_id=V - 2,
        video_token_id=V - 1,
        vision_start_token_id=V - 4,
        vision_end_token_id=V - 3,
        text_config=dict(
            **sizes,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": text["sections"]},
        ),
        vision_config=dict(hidden_size=text["hidden_size"], **vision),
    )


class Workload:
    """Weights, prompts, completions and advantages of a shape; `padded` is the batch of other systems."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.config = model_config(shape.model)
        torch.manual_seed(0)
        with torch.device(device):
            module = Qwen2VLForConditionalGeneration(self.config).to(self.dtype)
        self.module = module.train()
        generator = torch.Generator().manual_seed(0)
        V, width = self.config.text_config.vocab_size, 3 * 2 * 14 * 14
        self.prompts, self.tokens = [], []
        for text, (rows, columns) in zip(shape.text, shape.grids, strict=True):
            image = torch.full((rows * columns // 4,), self.config.image_token_id)
            words = torch.randint(V - 4, (text,), generator=generator)
            start, end = (torch.tensor([V - 4]), torch.tensor([V - 3]))
            ids = torch.cat([words[:2], start, image, end, words[4:]])
            mask, grid = ids == self.config.image_token_id, torch.tensor([[1, rows, columns]])
            pixels = torch.randn(rows * columns, width, generator=generator)
            positions = mrope_positions(mask, grid)
            self.prompts.append(Prompt(ids, positions, pixels, grid, image_mask=mask))
            answers = torch.randint(V - 4, (shape.G, shape.completion), generator=generator)
            self.tokens.append(answers.tolist())
        self.advantage = torch.randn(len(self.prompts), shape.G, generator=generator)

    def clone(self) -> Qwen2VLForConditionalGeneration:
        """A copy of the weights with PyTorch's SDPA everywhere, as Hugging Face loads it."""
        module = copy.deepcopy(self.module)
        vars(module.model.visual.patch_embed).pop("forward", None)  # the one that a policy sets
        module.set_attn_implementation("sdpa")
        return module

    def batches(self) -> list[dict[str, Tensor]]:
        """The micro-batches of other systems: all rows in one; on a GPU one per prompt, to fit its memory."""
        count = len(self.prompts)
        apart = self.device == "cuda"
        return [self.padded([i]) for i in range(count)] if apart else [self.padded(range(count))]

    def padded(self, members: Sequence[int]) -> dict[str, Tensor]:
        """These prompts padded on the left, repeated G times with their images, TRL's names."""
        G = self.shape.G
        whole = [self.prompts[i] for i in members]
        prompts = [prompt.ids.flip(0) for prompt in whole]
        ids = pad_sequence(prompts, batch_first=True).flip(1)
        mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1)
        completions = torch.tensor([answer for i in members for answer in self.tokens[i]])
        ids, mask = ids.repeat_interleave(G, 0), mask.repeat_interleave(G, 0)
        kinds = torch.cat([ids == self.config.image_token_id, torch.zeros_like(completions)], 1)
        batch = {
            "prompt_ids": ids,
            "prompt_mask": mask,
            "completion_ids": completions,
            "completion_mask": torch.ones_like(completions),
            "advantages": self.advantage[list(members)].flatten(),
            "pixel_values": torch.cat([p.pixels for p in whole for _ in range(G)]),
            "image_grid_thw": torch.cat([p.grid for p in whole for _ in range(G)]),
            "mm_token_type_ids": kinds.long(),
        }
        batch = {name: value.to(self.device) for name, value in batch.items()}
        batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        return batch | {"num_images": [1] * len(completions)}
