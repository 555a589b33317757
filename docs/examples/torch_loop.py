"""GRPO in plain PyTorch with two of the kernels, for any Hugging Face causal language model and any reward.

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
    """Sample 8 completions of one prompt per step and reinforce the better ones; return each step's mean reward."""
    G, new = 8, 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    inputs = tokenizer([prompt] * G, return_tensors="pt").to(model.device)
    history = []
    for _ in range(steps):
        ids = model.generate(**inputs, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        completions = ids[:, inputs.input_ids.shape[1] :]
        rewards = torch.tensor([reward(text) for text in tokenizer.batch_decode(completions)])
        states = model.model(input_ids=ids).last_hidden_state
        states = states[:, -new - 1 : -1]  # the states that predict the completions
        sequence_id = torch.arange(G, device=model.device).repeat_interleave(new)
        loss = linear_grpo_loss(
            states.flatten(0, 1),
            model.lm_head.weight,
            completions.flatten(),
            sequence_id,
            group_advantage(rewards.to(model.device), G),
            spec=GRPOLoss(beta=0.0),
        ).loss
        loss.backward()  # the loss already holds the gradients; this passes them on to the trunk
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(rewards.mean()))
    return history


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B"
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    for step, mean in enumerate(train(model, tokenizer, "Once upon a time"), 1):
        print(f"step {step}: reward {mean:.2f}")
