"""What a step costs: FLOPs, memory, and how near it comes to what a device can do. Start with `flops.py`."""
