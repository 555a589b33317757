"""`vtfast make-base`: trains the demo's base model from nothing. Start with `make_base.py`."""
