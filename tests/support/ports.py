"""Reserved free ports for programs that take a port on their command line."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Yield ports of 127.0.0.1 that the system gives to no other program while the block runs.

    They stay bound, without listening, with SO_REUSEADDR: Linux then lets a server that sets the
    same option (all that these tests start do) listen on them, but does not choose them as free
    ports. Probing and releasing would leave a gap in which another run can get them.
    """
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            ports.append(holder.getsockname()[1])
        yield ports


@contextmanager
def held_port() -> Iterator[int]:
    """Yield one port; see `held_ports`."""
    with held_ports(1) as (port,):
        yield port
