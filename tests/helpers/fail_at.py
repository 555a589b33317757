"""Out of memory at the n-th operation of PyTorch, and a training script in which one rank meets it."""

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MESSAGE = "CUDA out of memory (planted)."


class FailAt(TorchDispatchMode):
    """Raises torch.OutOfMemoryError in place of the operation `number`, from 1. Counts all operations."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number, self.count, self.failed = number, 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            self.failed = str(function)
            raise torch.OutOfMemoryError(f"{MESSAGE} In {function}")
        return function(*args, **(kwargs or {}))


def main(rank: str, step: str, share: str, *flags: str) -> int:
    """`vtfast train` with `flags`. In `step`, this rank fails at this share of the operations of the step before."""
    from vtfast.cli.main import main as command_line
    from vtfast.trainer import Trainer

    one_step, count = Trainer.step, [0]

    def failing(trainer, number, batch):
        target = number == int(step) and trainer.session.ranks.rank == int(rank)
        mode = FailAt(max(1, int(float(share) * count[0])) if target else 0)
        try:
            with mode:
                return one_step(trainer, number, batch)
        finally:
            count[0] = mode.count
            if mode.failed:
                print(f"planted in {mode.failed}", file=sys.stderr)

    Trainer.step = failing
    return command_line(["train", *flags])


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0].startswith("--local_rank="):
        del arguments[0]
    sys.exit(main(*arguments))
