"""What a rollout made, and what it left."""


def tokens(groups):
    return [[completion.tokens for completion in group] for group in groups]


def everything_is_free(rollout):
    cache = rollout.workspace.cache
    return sorted(cache.free) == list(range(1, cache.pages + 1))
