"""GRPO in plain PyTorch with two of the kernels: any Hugging Face causal language model, any reward.

python docs/examples/torch_loop.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vtfast_kernels.group_advantage import group_advantage
from vtfast_kernels.grpo_loss import GRPOLoss
from vtfast_kernels.linear_grpo_loss import linear_grpo_loss


def reward(text: str) -> float:
    return float(text.count("e"))


def train(model, tokenizer, prompt: str, steps: int = 20, lr: float = 1e-5) -> list[float]:
    """Sample 8 answers to one prompt, and make the better ones likelier; returns the mean reward of each step."""
    G, new = 8, 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    asked = tokenizer([prompt] * G, return_tensors="pt").to(model.device)
    history = []
    for _ in range(steps):
        ids = model.generate(**asked, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        answers = ids[:, asked.input_ids.shape[1] :]
        rewards = torch.tensor([reward(text) for text in tokenizer.batch_decode(answers)])
        states = model.model(input_ids=ids).last_hidden_state
        states = states[:, -new - 1 : -1]  # those that predicted the answers
        sequence = torch.arange(G, device=model.device).repeat_interleave(new)
        loss = linear_grpo_loss(
            states.flatten(0, 1),
            model.lm_head.weight,
            answers.flatten(),
            sequence,
            group_advantage(rewards.to(model.device), G),
            spec=GRPOLoss(beta=0.0),
        ).loss
        loss.backward()  # the gradients are made already: this hands them on
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(rewards.mean()))
    return history


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B"
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    for step, mean in enumerate(train(model, tokenizer, "Once upon a time"), 1):
        print(f"step {step}: reward {mean:.2f}")
