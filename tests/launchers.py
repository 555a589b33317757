"""DeepSpeed's launcher on a port that is free: tests run beside each other."""

import os
import socket

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_launcher(ranks: int = 2) -> tuple[str, ...]:
    return ("deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()))


def outside_ranks() -> dict[str, str]:
    """The environment without what a trainer in this process, or somebody's library, says of ranks."""
    return {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
