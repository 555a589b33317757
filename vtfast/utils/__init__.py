"""What every wing uses: errors, files, the hub, text for a terminal. Start with `errors.py`."""
