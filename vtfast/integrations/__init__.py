"""The kernels in other libraries' trainers.

`trl.py` has `use_fused_loss(trainer)` for TRL's GRPOTrainer; start reading there.
"""
