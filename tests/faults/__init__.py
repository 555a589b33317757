"""Kill a run at seeded moments, damage what it left, resume it, and compare the end bit for bit.

`python -m tests.faults`:

    runs      the commands whose runs are killed
    plan      which fault strikes where: a function of the seed and the trial's number
    places    what is counted inside a trainer, and what happens at the n-th time
    start     what runs in the process of a trainer
    launch    starting trainers on all ranks, as users do or by forks, and seeing them out
    damage    what a disk or a careless hand does to a checkpoint
    verify    whole checkpoints, equal runs, processes left over
    campaign  trials, one after the other

Importing this package imports neither torch nor vtfast.
"""
