"""Training and evaluation of the tiny base model: batches, a fast forward, Muon, sampling, scores.

An example is always one 84 x 84 image, and its prompt starts with `<|vision_start|>` and nine image tokens; so all
images run through the vision encoder as one dense batch, where Hugging Face's code loops over them. A test compares the
two.

B = examples, L = padded length, D = hidden size, V = vocabulary.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Qwen2VLForConditionalGeneration

from vtfast.data.synthetic import CELL, COLOURS, GRID, KINDS, RADIUS, SHAPES, Question, Scene, encode_jpeg, render
from vtfast.model.tiny_model import PIXEL_MEAN, PIXEL_STD

PATCH = CELL // 2
IMAGE_TOKENS = GRID * GRID
MAX_NEW_TOKENS = 32
_ANSWER = re.compile(r"(.*)</think><answer>(.*)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """`prompt` and `completion` are token ids; the prompt has its nine image tokens already."""

    scene: Scene
    prompt: list[int]
    completion: list[int]


def pixel_patches(scenes: Sequence[Scene]) -> Tensor:
    """[B, 36, 588] normalised patches in the order of Qwen2-VL's image processor.

    Scenes pass through JPEG, as in the data set. The processor repeats each patch for two frames;
    here it appears once, and `image_features` adds the two frames' weights instead.
    """
    images = [Image.open(io.BytesIO(encode_jpeg(render(scene)))) for scene in scenes]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    pixels = (pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    # row of cells, row in cell, pixel, column of cells, column in cell, pixel, channel
    blocks = pixels.view(-1, GRID, 2, PATCH, GRID, 2, PATCH, 3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(scenes), 4 * IMAGE_TOKENS, -1)


def image_features(model: Qwen2VLForConditionalGeneration, patches: Tensor) -> Tensor:
    """[B, 36, 588] patches -> [B, 9, D]: the vision encoder, all images as one batch."""
    visual = model.model.visual
    B, P, _ = patches.shape
    hidden = F.linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1))
    cell, inside = torch.arange(P) // 4, torch.arange(P) % 4  # patches come cell by cell, 2 x 2
    places = torch.stack([cell // GRID * 2 + inside // 2, cell % GRID * 2 + inside % 2], -1)
    cos, sin = visual.rotary_pos_emb(hidden, places)
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(B, P, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(B, P, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.flatten(0, 1)).view(B, IMAGE_TOKENS, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def prompt_positions(length: int) -> Tensor:
    """[3, length] M-RoPE positions: one text token, the 3 x 3 image, then text."""
    cells = torch.arange(IMAGE_TOKENS)
    image = torch.stack([torch.zeros_like(cells), cells // GRID, cells % GRID]) + 1
    text = torch.arange(length - 1 - IMAGE_TOKENS) + 1 + GRID
    return torch.cat([torch.zeros(3, 1, dtype=torch.long), image, text.expand(3, -1)], 1)


class CellReader(nn.Module):
    """Linear heads that read from an image token what lies in its cell; only for training.

    They make the vision encoder represent colour, shape, size, column and row from the start, before the
    language model uses them.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.classes = [len(values) + 1 for values in (COLOURS, SHAPES, RADIUS)] + [GRID, GRID]
        self.head = nn.Linear(hidden, sum(self.classes))

    def loss(self, features: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Cross-entropy of features [B, 9, D], summed over the five properties, 0-d."""
        logits = self.head(features).flatten(0, 1).split(self.classes, -1)
        targets = cell_contents(scenes).flatten(0, 1).unbind(-1)
        pairs = zip(logits, targets, strict=True)
        return torch.stack([F.cross_entropy(*pair) for pair in pairs]).sum()


def cell_contents(scenes: Sequence[Scene]) -> Tensor:
    """[B, 9, 5]: colour, shape, size (0 = nothing there), column and row of each cell."""
    contents = torch.zeros(len(scenes), IMAGE_TOKENS, 5, dtype=torch.long)
    cells = torch.arange(IMAGE_TOKENS)
    contents[..., 3], contents[..., 4] = cells % GRID, cells // GRID
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            features = (list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), list(RADIUS).index(thing.size))
            contents[i, thing.row * GRID + thing.column, :3] = torch.tensor(features) + 1
    return contents


def completion_loss(
    model: Qwen2VLForConditionalGeneration, examples: Sequence[Example], pad: int, reader: CellReader | None = None
) -> Tensor:
    """Mean cross-entropy of the completions' tokens, plus that of `reader` if there is one; 0-d."""
    lengths = [len(e.prompt) + len(e.completion) for e in examples]
    ids = torch.full((len(examples), max(lengths)), pad)
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids[row, :length] = torch.tensor(example.prompt + example.completion)
        scored[row, len(example.prompt) : length] = True
    language = model.model.language_model
    embedded = language.embed_tokens(ids)
    features = image_features(model, pixel_patches([e.scene for e in examples]))
    embedded = torch.cat([embedded[:, :1], features, embedded[:, 1 + IMAGE_TOKENS :]], 1)
    # Padding is on the right, where causal attention never looks: no mask is needed.
    positions = prompt_positions(ids.shape[1])[:, None].expand(-1, len(examples), -1)
    hidden = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][scored[:, 1:]])
    loss = F.cross_entropy(logits, ids[scored])
    return loss if reader is None else loss + reader.loss(features, [e.scene for e in examples])


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised before they are applied (Jordan, 2024).

    In fp32 and batched over equal shapes: `torch.optim.Muon` multiplies in bf16, slowly on CPUs.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closure is ever passed
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(updates), strict=True):
                    parameter.sub_(update, alpha=scale)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["buffer"] = torch.zeros_like(parameter)
        state["buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["buffer"], momentum)  # Nesterov


def orthogonalise(matrices: Tensor) -> Tensor:
    """[B, rows, columns]: singular values pushed towards 1 by five quintic Newton-Schulz steps."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


@torch.no_grad()
def complete(
    model: Qwen2VLForConditionalGeneration,
    scenes: Sequence[Scene],
    prompts: Sequence[list[int]],
    *,
    eos: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """One completion a prompt, end token left off: greedy, or at temperature 1 with `generator`."""
    language = model.model.language_model
    B, L = len(prompts), max(map(len, prompts))
    ids = torch.full((B, L), eos)
    mask = torch.zeros(B, L, dtype=torch.long)
    image = torch.zeros(B, L, dtype=torch.bool)
    positions = torch.zeros(3, B, L, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padding on the left, so that all continue in one column
        start = L - len(prompt)
        ids[row, start:] = torch.tensor(prompt)
        mask[row, start:] = 1
        image[row, start + 1 : start + 1 + IMAGE_TOKENS] = True
        positions[:, row, start:] = prompt_positions(len(prompt))
    features = image_features(model, pixel_patches(scenes))
    inputs = language.embed_tokens(ids).masked_scatter(image[..., None], features)
    cache = DynamicCache(config=language.config)
    written: list[Tensor] = []
    live = torch.ones(B, dtype=torch.bool)
    for _ in range(MAX_NEW_TOKENS):
        hidden = language(
            inputs_embeds=inputs, position_ids=positions, attention_mask=mask, past_key_values=cache
        ).last_hidden_state[:, -1]
        logits = model.lm_head(hidden)
        token = logits.argmax(-1)
        if generator is not None:
            token = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
        token = torch.where(live, token, eos)
        written.append(token)
        live &= token != eos
        if not live.any():
            break
        inputs = language.embed_tokens(token)[:, None]
        positions = positions[:, :, -1:] + 1
        mask = F.pad(mask, (0, 1), value=1)
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def scores(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """{"accuracy" | "format" | "trace": {"all" or kind: share}} of completions, one a question.

    The trace counts if all in front of `</think>` (or `<answer>`) is exact.
    """
    marks: dict[str, dict[str, list[bool]]] = {
        name: {kind: [] for kind in ("all", *KINDS)} for name in ("accuracy", "format", "trace")
    }
    for question, text in zip(questions, texts, strict=True):
        match = _ANSWER.fullmatch(text)
        inside = re.search(r"<answer>([^<]*)</answer>", text)
        whole = match is not None and all(text.count(tag) == 1 for tag in ("</think>", "<answer>", "</answer>"))
        right = inside is not None and inside[1] == question.answer
        exact = text.startswith(question.trace) and text[len(question.trace) :][:1] in ("<", " ")
        for name, mark in (("accuracy", right), ("format", whole), ("trace", exact)):
            marks[name]["all"].append(mark)
            marks[name][question.kind].append(mark)
    return {name: {kind: round(sum(m) / len(m), 4) for kind, m in kinds.items() if m} for name, kinds in marks.items()}
