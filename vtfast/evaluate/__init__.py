"""Judging a policy on questions that it was not trained on."""

from vtfast.evaluate.held_out import HeldOut, held_out

__all__ = ["HeldOut", "held_out"]
