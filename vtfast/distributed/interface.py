"""The network interface that reaches the other machines. gloo takes the one that the machine's own name resolves to,
which on Debian is 127.0.1.1: no other machine can connect to that."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket

log = logging.getLogger("vtfast")

ELSEWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): the way there is the default route."""


def set_gloo_interface() -> None:
    """Set GLOO_SOCKET_IFNAME for ranks on several machines, unless the user has."""
    local, world = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if local >= world or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interface = find_interface(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if interface is None:
        log.warning("no network interface reaches %s; set GLOO_SOCKET_IFNAME", os.environ["MASTER_ADDR"])
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def find_interface(master: str, port: int) -> str | None:
    """Name of the interface from which packets to `master` leave; on the master itself, whose name may resolve to the
    loopback, from which they leave for other machines."""
    import psutil  # not needed by the benches of kernels, which import this file

    for host in (master, ELSEWHERE):
        address = _own_address(host, port)
        if address is None or ipaddress.ip_address(address).is_loopback:
            continue
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address.split("%")[0] == address for entry in addresses):
                return name
    return None


def _own_address(host: str, port: int) -> str | None:
    """This machine's address on the way to `host`. Nothing is sent."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return None
