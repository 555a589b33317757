"""The ranks of a run: how they start, exchange objects, are watched, and train with ZeRO-2. Start with `ranks.py`."""
