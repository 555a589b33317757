"""A prompt in the words of Hugging Face's own forward and generate: the oracle of scoring and rollout."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from vtfast.data.prompt import Prompt
from vtfast.model.policy import Policy

# Of the fixture `prompts`: groups of 3, 1, 8 and 2, some of one token.
COMPLETIONS = [
    [[5, 6, 7], [8], [9, 9]],
    [[9, 10]],
    [[11, 12, 13, 14], [15, 5], [6], [7], [8, 8], [20], [30, 31, 32], [33]],
    [[7, 7], [40, 41, 42, 43, 44]],
]


def inputs(prompt: Prompt, tokens: list[int] | tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Arguments of a model of transformers for one prompt followed by completion `tokens`."""
    ids = torch.cat([prompt.ids, torch.tensor(tokens, dtype=torch.int64)])[None]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pixels is None:
        return arguments
    kinds = torch.zeros_like(ids)
    kinds[0, : len(prompt.ids)] = prompt.image_mask.long()
    images = {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grid, "mm_token_type_ids": kinds}
    return arguments | images


@contextlib.contextmanager
def plain(policy: Policy) -> Iterator[torch.nn.Module]:
    """The same module as Hugging Face loads it: its own attention everywhere, nothing of ours in its forward."""
    configs = [policy.language_model.config]
    if policy.vision is not None:
        configs.append(policy.vision.module.config)
    ours = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "sdpa"
    own = vars(policy.vision.module.patch_embed) if policy.vision is not None else {}
    embed = own.pop("forward", None)
    try:
        yield policy.module
    finally:
        if embed is not None:
            own["forward"] = embed
        for config, name in zip(configs, ours, strict=True):
            config._attn_implementation = name


def logprobs(policy: Policy, prompt: Prompt, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [tokens] of one completion behind its prompt, alone in its row: unpacked, unshared."""
    with plain(policy) as module:
        logits = module(**inputs(prompt, tokens)).logits[0, len(prompt.ids) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)[range(len(tokens)), tokens]


def padded(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of `Qwen2VLForConditionalGeneration` for a batch of prompts with one answer each, padded right."""
    alone = [inputs(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for arguments in alone:
        arguments.setdefault("mm_token_type_ids", torch.zeros_like(arguments["input_ids"]))
    batch = {
        name: pad_sequence([arguments[name][0] for arguments in alone], True, value)
        for name, value in {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}.items()
    }
    for name in ("pixel_values", "image_grid_thw"):
        parts = [arguments[name] for arguments in alone if name in arguments]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def flat(scores) -> torch.Tensor:
    return torch.cat([logp for group in scores for logp in group])
