"""The structure of VisualThinker-R1-Zero's GRPO step (its code of March 2025), in plain PyTorch and transformers.

Re-created, prompt by prompt, with gradients accumulated over the prompts of an optimizer step:
    G calls of `generate` in sequence with batch size 1, each with its own prefill and vision encoder forward
    the G completions padded to the longest; the image repeated G times for the policy, and again for the reference
    logits of the whole vocabulary for prompt and completion, log-softmax row by row, then dropped for the prompt
    the reference model, a copy of the policy, in a second whole forward
    rewards on the main thread; k3 KL inside the loss; the ratio is 1; every group runs both forwards
Left out: top_k 50 (all contestants sample from the whole softmax), gradient checkpointing (its script enables it; it
would only cost time), DeepSpeed and several GPUs, its processor (ours makes the same tensors), and completions that end
early.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

from bench._phases import Phases
from bench._task import BETA, MAX_PIXELS, Task, variety
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt

END = 0
"""Padding token; `min_new_tokens` prevents it from ending a completion."""


class Original:
    def __init__(self, task: Task, phases: Phases) -> None:
        self.task, self.phases = task, phases
        self.processor = Processor.from_pretrained(task.checkpoint, max_pixels=MAX_PIXELS)
        module = Qwen2VLForConditionalGeneration.from_pretrained(
            task.checkpoint, dtype=task.dtype, attn_implementation="sdpa"
        )
        self.module = module.to(task.device).train()
        self.reference = copy.deepcopy(self.module).eval().requires_grad_(False)
        settings = task.optimizer
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=settings.learning_rate, eps=settings.adam_epsilon, weight_decay=0.0, fused=True
        )
        n, config = task.shape.completion, module.config
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=n,
            min_new_tokens=n,
            eos_token_id=END,
            pad_token_id=END,
            use_cache=True,
            suppress_tokens=[config.image_token_id, config.video_token_id],  # they would need image features
        )

    def step(self) -> None:
        prompts = len(self.task.questions)
        with self.phases.step():
            for number in range(prompts):
                loss = self.loss(number)
                with self.phases.phase("update"):
                    (loss / prompts).backward()
            with self.phases.phase("optimizer"):
                limit = self.task.optimizer.max_grad_norm
                if limit:
                    torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    def loss(self, number: int) -> Tensor:
        """The loss of one prompt's group."""
        with self.phases.phase("data"):
            prompt = self.processor.encode(self.task.text(number), [self.task.image(number)])
        with self.phases.phase("rollout"):
            completions = self.sample(prompt, number)
        with self.phases.phase("update"):
            logp = self.logps(self.module, prompt, completions)
        with self.phases.phase("reference"), torch.inference_mode():
            reference = self.logps(self.reference, prompt, completions)
        with self.phases.phase("rewards"):
            texts = [self.processor.decode(completion) for completion in completions]
            rewards = torch.tensor([variety(text) for text in texts], device=logp.device)
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        difference = reference.clone() - logp
        kl = difference.exp() - difference - 1
        return -((logp - logp.detach()).exp() * advantage[:, None] - BETA * kl).mean(1).mean()

    def sample(self, prompt: Prompt, number: int) -> Tensor:
        """Token ids of G completions [G, tokens]."""
        if self.task.completions:
            return torch.tensor(self.task.completions[number], device=self.task.device)
        inputs = self.inputs(prompt.ids[None], prompt, 1)
        with torch.no_grad():
            completions = [
                self.module.generate(**inputs, generation_config=self.generation)[0, len(prompt.ids) :]
                for _ in range(self.task.shape.G)
            ]
        return pad_sequence(completions, batch_first=True, padding_value=END)

    def logps(self, module: torch.nn.Module, prompt: Prompt, completions: Tensor) -> Tensor:
        """Log-probs of every token of prompt and completion, cut to the completions [G, tokens]."""
        rows = prompt.ids.to(completions.device).expand(len(completions), -1)
        ids = torch.cat([rows, completions], 1)
        logits = module(**self.inputs(ids, prompt, len(completions))).logits[:, :-1]
        each = [
            row.log_softmax(-1).gather(-1, target[:, None])[:, 0]
            for row, target in zip(logits, ids[:, 1:], strict=True)
        ]
        return torch.stack(each)[:, len(prompt.ids) - 1 :]

    def inputs(self, ids: Tensor, prompt: Prompt, copies: int) -> dict[str, Tensor]:
        """Model inputs for `ids` [copies, length] with one copy of the image each."""
        kinds = torch.zeros_like(ids, device="cpu")
        kinds[:, : len(prompt.ids)] = prompt.image_mask.long()
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": prompt.pixels.to(self.task.dtype).repeat(copies, 1),
            "image_grid_thw": prompt.grid.repeat(copies, 1),
            "mm_token_type_ids": kinds,
        }
        return {name: value.to(self.task.device) for name, value in batch.items()}

    def close(self) -> None:
        """Holds nothing that needs closing."""
