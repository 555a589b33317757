"""One file a benchmark: its rows, its prompts and its official score. `cvbench.py` is a short one."""
