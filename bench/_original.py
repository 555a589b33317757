"""The structure of VisualThinker-R1-Zero's GRPO step (its code of March 2025), in plain PyTorch and transformers.

What is re-created, prompt by prompt, gradients added up over the prompts of an optimizer step:
    G calls of `generate` one after the other, batch size 1, each with its own prefill and run of the vision tower
    the G answers padded to the longest; the image repeated G times for the policy, and again for the reference
    logits of the whole vocabulary for prompt and answer, log-softmax row by row, the prompt's part thrown away after
    the reference, a copy of the policy, by a second whole forward
    rewards on the main thread; k3 KL inside the loss; the ratio is 1; every group pays for both forwards
What is not: top_k 50 (all sample from the whole softmax here), gradient checkpointing (on in its script: it would only
cost time), DeepSpeed and several GPUs, its processor (ours makes the same tensors), and answers that end early.
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
"""Pads; `min_new_tokens` keeps it from ending an answer."""


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
            suppress_tokens=[config.image_token_id, config.video_token_id],  # they would want features of their own
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
        """Of one prompt's group."""
        with self.phases.phase("data"):
            prompt = self.processor.encode(self.task.text(number), [self.task.image(number)])
        with self.phases.phase("rollout"):
            answers = self.answer(prompt, number)
        with self.phases.phase("update"):
            logp = self.logps(self.module, prompt, answers)
        with self.phases.phase("reference"), torch.inference_mode():
            reference = self.logps(self.reference, prompt, answers)
        with self.phases.phase("rewards"):
            texts = [self.processor.decode(answer) for answer in answers]
            rewards = torch.tensor([variety(text) for text in texts], device=logp.device)
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        apart = reference.clone() - logp
        kl = apart.exp() - apart - 1
        return -((logp - logp.detach()).exp() * advantage[:, None] - BETA * kl).mean(1).mean()

    def answer(self, prompt: Prompt, number: int) -> Tensor:
        """[G, tokens]"""
        if self.task.answers:
            return torch.tensor(self.task.answers[number], device=self.task.device)
        inputs = self.inputs(prompt.ids[None], prompt, 1)
        with torch.no_grad():
            answers = [
                self.module.generate(**inputs, generation_config=self.generation)[0, len(prompt.ids) :]
                for _ in range(self.task.shape.G)
            ]
        return pad_sequence(answers, batch_first=True, padding_value=END)

    def logps(self, module: torch.nn.Module, prompt: Prompt, answers: Tensor) -> Tensor:
        """[G, tokens]: log-probs of every token of prompt and answer, cut to the answers."""
        rows = prompt.ids.to(answers.device).expand(len(answers), -1)
        ids = torch.cat([rows, answers], 1)
        logits = module(**self.inputs(ids, prompt, len(answers))).logits[:, :-1]
        each = [
            row.log_softmax(-1).gather(-1, target[:, None])[:, 0]
            for row, target in zip(logits, ids[:, 1:], strict=True)
        ]
        return torch.stack(each)[:, len(prompt.ids) - 1 :]

    def inputs(self, ids: Tensor, prompt: Prompt, copies: int) -> dict[str, Tensor]:
        """`ids` [copies, length] behind as many copies of the image."""
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
        """Nothing outlives it."""
