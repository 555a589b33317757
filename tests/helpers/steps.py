"""A step taken apart: its answers, their log-probs, the weights that it moves."""

import torch

from vtfast.data.prompt_templates import response_prefix
from vtfast.scoring import completion_logprobs
from vtfast.training.groups import score_completions, with_advantages


def logprobs(trainer, groups, summed=True):
    """Log-prob of every answer [questions x G]; or of every token, a tensor a group."""
    with torch.no_grad():
        scores = completion_logprobs(
            trainer.session.policy, [group.prompt for group in groups], [group.tokens for group in groups]
        )
    if not summed:
        return [torch.cat(group) for group in scores]
    return torch.stack([logp.sum() for group in scores for logp in group])


def scored(trainer, batch, step=1):
    """Groups with rewards and advantages: what a step has before it is cut into micro-batches."""
    session, config = trainer.session, trainer.config
    sampled = trainer.sample(batch, step)
    rewards = score_completions(sampled, trainer.scorer, response_prefix(session.prompt_builder.template))
    weights = config.reward_weights or [1.0] * len(config.reward_funcs)
    return with_advantages(sampled, rewards, weights, config.scale_rewards, session.ranks)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.session.policy.module.named_parameters()}


# Adam's first step is the gradient's sign, even where the gradient is nothing but rounding. With this epsilon it is
# the gradient itself.
PROPORTIONAL = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0}


def shake(trainer, size):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.session.policy.module.parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
