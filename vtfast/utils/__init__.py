"""Errors, files, YAML, the Hugging Face hub and text for messages, for all other packages. Start with `errors.py`."""
