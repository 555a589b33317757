"""A user's own reward, which a run scores in processes of their own: they must not outlive it."""

from typing import Any


def variety(completion: str, sample: Any) -> float:
    """Share of different characters, so that nearly all answers to a question differ in it."""
    return len(set(completion)) / (1 + len(completion))
