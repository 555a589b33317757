"""DeepSpeed's launcher on a port that is free: tests run beside each other."""

import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_launcher(ranks: int = 2) -> tuple[str, ...]:
    return ("deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()))
