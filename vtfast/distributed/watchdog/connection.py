"""JSON messages over TCP, one a line, and the door through which ranks come to rank 0."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket

from vtfast.utils.errors import UserError

GONE = 45
"""Seconds after which a machine that does not answer any more counts as gone. The kernels' doing: a process that is
stopped or busy still has a kernel that answers for it."""
LONGEST = 1 << 16
"""Bytes of a message; who sends more is none of us."""
SEND_LIMIT = 1.0
"""Seconds; who does not take a message for so long is sent no more."""
CONNECT_LIMIT = 60.0


class Line:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.buffer, self.deaf = b"", False
        sock.settimeout(SEND_LIMIT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {
            "TCP_KEEPIDLE": GONE // 3,
            "TCP_KEEPINTVL": GONE // 9,
            "TCP_KEEPCNT": 6,
            "TCP_USER_TIMEOUT": GONE * 1000,
        }
        for name, value in options.items():
            if hasattr(socket, name):  # names of Linux
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: object) -> None:
        """What cannot be sent is dropped: `receive` tells that a connection is closed, a watch that nobody reads."""
        if self.deaf:
            return
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.deaf = True  # perhaps in the middle of a line

    def receive(self) -> list[dict]:
        """What arrived, once something is ready. Raises EOFError at the end, OSError where the network failed."""
        try:
            arrived = self.socket.recv(LONGEST)
        except ConnectionResetError:
            arrived = b""
        except TimeoutError as error:
            if error.errno is None:  # the socket's own limit: nothing was there after all
                return []
            raise
        if not arrived:
            raise EOFError
        *lines, self.buffer = (self.buffer + arrived).split(b"\n")
        if len(self.buffer) > LONGEST:
            raise EOFError
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise EOFError from None
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


class Door:
    """Rank 0's listening socket. `address`: (host, port, token) for the others; who lacks the token stays outside."""

    def __init__(self, host: str, *, local: bool) -> None:
        """`host`: rank 0's name to the others. `local`: all ranks are on this machine."""
        name = "127.0.0.1" if local else host
        if not local and socket.has_dualstack_ipv6():
            self.socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            self.socket = socket.create_server((name if local else "", 0), backlog=1024)
        self.address = (name, self.socket.getsockname()[1], secrets.token_hex(16))

    def fileno(self) -> int:
        return self.socket.fileno()

    def accept(self) -> Line:
        return Line(self.socket.accept()[0])

    def close(self) -> None:
        self.socket.close()


def connect(address: tuple[str, int, str], rank: int) -> Line:
    """A line to rank 0. Raises UserError where it cannot be reached."""
    host, port, token = address
    try:
        line = Line(socket.create_connection((host, port), CONNECT_LIMIT))
    except OSError as error:
        raise UserError(
            f"rank {rank} cannot reach rank 0 at {host}, port {port} ({error}): let the machines of a run reach each"
            " other on any port, or give --rank_timeout 0 to run without watching the ranks"
        ) from None
    line.send(token=token, rank=rank)
    return line
