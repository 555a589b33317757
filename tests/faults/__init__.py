"""Kill a run at seeded moments, damage what it left, resume it, and compare the end bit for bit.

`python -m tests.faults`:

    runs      the commands whose runs are killed
    plan      which fault is injected where: a function of the seed and the trial's number
    places    what is counted inside a trainer, and the fault at the n-th time
    start     the code that runs in the process of a trainer
    launch    starting trainers on all ranks, as users do or by forks, and waiting for them
    damage    damage to a checkpoint by a disk or a user
    verify    whole checkpoints, equal runs, processes left over
    campaign  runs the trials in sequence

Importing this package imports neither torch nor vtfast.
"""
