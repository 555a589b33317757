"""Ranks: how they start, talk to each other, are watched, and train with ZeRO-2. Start with `ranks.py`."""
