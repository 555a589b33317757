"""`vtfast make-base`: trains the demo's base model from random weights. Start with `recipe.py`."""
