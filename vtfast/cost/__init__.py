"""What a step costs: FLOPs, micro-batches, memory, and the time that a device needs at least. Start with `flops.py`."""
