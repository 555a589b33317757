"""TRL's contestant of `bench step`: `GRPOTrainer.train()` itself, one step at a time.

The trainer is TRL's, unchanged, with its own data loader, generation by transformers, padded log-probs, loss, clipping
and AdamW. Three things around it are this bench's:
    `Processing`   transformers' `Qwen2VLProcessor` without its video half, which needs torchvision
    `Turnstile`    a callback that lets `train()`, in its own thread, run to the end of its next step
    settings       one generation per step for all prompts x G, and one backward (on a GPU one per prompt, to fit its
                   memory); no gradient checkpointing, which is TRL's default and costs time; no logging or saving; the
                   study's KL; lengths fixed by `min_new_tokens`
On a GPU its weights and AdamW state are bf16, which reads less memory than our fp32 masters.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset, Image, List
from transformers import (
    PrinterCallback,
    ProcessorMixin,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from bench._phases import Phases
from bench._task import BETA, MAX_PIXELS, Task, variety
from vtfast.data.processor import Processor
from vtfast.data.prompt_templates import IMAGE

TEMPLATE = (
    "{% for message in messages %}{% for item in message.content %}"
    "{% if item.type == 'image' %}" + IMAGE + "{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
"""Only the contents of a conversation: the same tokens as the prompts of the other contestants."""


class Processing(Qwen2VLProcessor):
    """`Qwen2VLProcessor` without a video processor, which `AutoProcessor` requires."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class TRL:
    def __init__(self, task: Task, phases: Phases) -> None:
        self.phases, prompts, n = phases, len(task.questions), task.shape.completion
        parts = Processor.from_pretrained(task.checkpoint, max_pixels=MAX_PIXELS)
        parts.tokenizer.padding_side = "left"  # as TRL loads it
        has_flash = (  # its kernels support half precision only
            task.dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None
        )
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            task.checkpoint, dtype=task.dtype, attn_implementation="flash_attention_2" if has_flash else "sdpa"
        )
        rows = {
            "prompt": [[{"role": "user", "content": question}] for question in task.questions],
            "images": [[str(task.image(prompt))] for prompt in range(prompts)],
        }
        self.turnstile = Turnstile(phases, task.threads)
        passes = prompts if task.device == "cuda" else 1
        with no_launcher():
            settings = GRPOConfig(
                output_dir=str(task.folder / f"trl-{id(self)}"),
                per_device_train_batch_size=prompts * task.shape.G // passes,
                gradient_accumulation_steps=passes,
                steps_per_generation=passes,
                num_generations=task.shape.G,
                max_completion_length=n,
                generation_kwargs={"min_new_tokens": n},
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                beta=BETA,
                loss_type="grpo",
                use_bias_correction_kl=False,  # TRL's default weighs the KL by the ratio; the study and we do not
                learning_rate=task.optimizer.learning_rate,
                adam_epsilon=task.optimizer.adam_epsilon,
                max_grad_norm=task.optimizer.max_grad_norm,
                weight_decay=0.0,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                max_steps=1_000_000,
                shuffle_dataset=False,
                gradient_checkpointing=False,
                bf16=False,  # no autocast: on a GPU the weights are bf16 already
                use_cpu=task.device == "cpu",
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            )
            self.trainer = trainer = GRPOTrainer(
                model=model,
                reward_funcs=reward,
                args=settings,
                train_dataset=Dataset.from_dict(rows).cast_column("images", List(Image())),
                processing_class=Processing(parts.image_processor, parts.tokenizer, TEMPLATE),
                callbacks=[self.turnstile],
            )
        trainer.remove_callback(PrinterCallback)
        self.module = trainer.model
        if task.completions:
            flat = [list(ids) for group in task.completions for ids in group]
            trainer._generate_single_turn = lambda *_, **__: (flat, None)
        phases.watch(trainer, "get_batch_samples", "data")
        phases.watch(parts.image_processor, "preprocess", "data")
        phases.watch(trainer, "_generate_single_turn", "rollout")
        phases.watch(trainer, "_calculate_rewards", "rewards")
        phases.watch(trainer, "training_step", "update")
        phases.watch(trainer, "_prepare_inputs", "rest")
        phases.watch(trainer, "_get_per_token_logps_and_entropies", self._whose_logps)
        phases.watch(trainer, "_clip_grad_norm", "optimizer")
        self.thread = threading.Thread(target=self._train, daemon=True)

    def _whose_logps(self, model: torch.nn.Module, *_, **__) -> str:
        return "reference" if model is self.trainer.ref_model else "update"

    def _train(self) -> None:
        try:
            self.turnstile.wait()
            self.trainer.train()
        except BaseException as error:  # raised in `one_step`
            self.turnstile.error = error
        finally:
            self.turnstile.done.set()

    def step(self) -> None:
        with self.phases.step():
            if not self.thread.is_alive():
                self.thread.start()
            self.turnstile.one_step()

    def close(self) -> None:
        if self.thread.is_alive():
            self.turnstile.stop = True
            self.turnstile.go.set()
            self.thread.join()


class Turnstile(TrainerCallback):
    """Blocks `train()` after every step until the next one is requested."""

    def __init__(self, phases: Phases, threads: int) -> None:
        self.phases, self.threads = phases, threads
        self.go, self.done = threading.Event(), threading.Event()
        self.stop, self.error = False, None

    def wait(self) -> None:
        """Block until a step is requested. Called in the thread of `train()`."""
        self.go.wait()
        self.go.clear()
        torch.set_num_threads(self.threads)  # OpenMP keeps the number for each thread

    def one_step(self) -> None:
        """Let `train()` run one step. Called in the caller's thread; raises the error that `train()` has raised."""
        self.done.clear()
        self.go.set()
        self.done.wait()
        if self.error is not None:
            raise self.error

    def on_train_begin(self, args, state, control, optimizer=None, **_) -> None:
        self.phases.watch(optimizer, "step", "optimizer")

    def on_step_end(self, args, state, control, **_) -> None:
        self.done.set()
        self.wait()
        control.should_training_stop = self.stop


def reward(completions, **_) -> list[float]:
    return [variety(message[0]["content"]) for message in completions]


@contextmanager
def no_launcher() -> Iterator[None]:
    """Unset LOCAL_RANK, which our trainer's start sets and accelerate takes for a distributed run."""
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
