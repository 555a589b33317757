"""The kernels inside trainers of others."""
