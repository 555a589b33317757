"""The run around the step of `vtfast/trainer.py`: setup, loop, update, metrics, checkpoints.
Start with `loop.py`."""
