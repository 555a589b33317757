"""Supervised fine-tuning with transformers' Trainer and `linear_logprob`, without logits in memory.

python docs/examples/transformers_sft.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from vtfast_kernels.linear_logprob import linear_logprob


class FusedLossTrainer(Trainer):
    """Hugging Face's Trainer with another loss: cross entropy from hidden states."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]  # a position predicts the token after it
        # Call the wrapped model (DDP, DeepSpeed) and let it compute the logits of one position only.
        states = model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        head = self.accelerator.unwrap_model(model).lm_head.weight
        logp = linear_logprob(states[:, :-1].flatten(0, 1), head, labels.flatten())  # 0 at -100
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return -logp.sum() / count


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad rows of `input_ids`; the first `prompt` tokens of a row are not targets."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    labels = [row.clone() for row in ids]
    for label, row in zip(labels, rows, strict=True):
        label[: row["prompt"]] = -100
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def fine_tune(model, rows: list[dict], folder: str, **settings) -> FusedLossTrainer:
    arguments = TrainingArguments(output_dir=folder, report_to=[], remove_unused_columns=False, **settings)
    trainer = FusedLossTrainer(model, arguments, data_collator=collate, train_dataset=rows)
    trainer.train()
    return trainer


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B"
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    pairs = [("The capital of France is", " Paris"), ("Two and three make", " five")]
    rows = [{"input_ids": tokenizer(a + b).input_ids, "prompt": len(tokenizer(a).input_ids)} for a, b in pairs]
    fine_tune(model, rows, "runs/example-sft", max_steps=20, learning_rate=1e-4)
