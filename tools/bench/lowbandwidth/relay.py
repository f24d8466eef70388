"""Switch in user space that delays frames and drops some, for kernels without netem.

It runs in the hub's namespace in place of the bridge, as ``relay.py DELAY_MS LOSS PORT...``, and
prints ``switching`` when it is ready. The kernel limits rates: both ends of every link are shaped.
"""

import contextlib
import os
import random
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

__all__: list[str] = []

# linux/if_packet.h and linux/if_ether.h; the socket module has no names for them.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL = 0x0003
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
# struct virtio_net_hdr, before every frame: where the checksum goes that the sender left to a
# network card. There is none on the way, so it travels along and the receiver takes it as checked.
_OFFLOAD_BYTES = 10
_MAC = slice(_OFFLOAD_BYTES, _OFFLOAD_BYTES + 6)
_SOURCE_MAC = slice(_OFFLOAD_BYTES + 6, _OFFLOAD_BYTES + 12)

# Chosen: more than the shaper behind it holds for half a second at 100 Mbit/s, so that the shaper
# alone decides what is dropped.
_SOCKET_BYTES: Final = 64 << 20
_LARGEST_FRAME = 1 << 16
_BATCH = 64  # chosen: frames of one port before the next is looked at, and what is due sent


class _Switch:
    """Learns which address is behind which port, and forwards each frame when its time has come.

    Args:
        ports: Sockets that are bound to the ports.
        delay_s: Time between the arrival of a frame and its departure.
        loss: Share of frames that are dropped, drawn for each frame.
    """

    def __init__(self, ports: Sequence[socket.socket], delay_s: float, loss: float) -> None:
        self._ports = list(ports)
        self._delay_s, self._loss = delay_s, loss
        self._port_of: dict[bytes, socket.socket] = {}
        self._waiting: deque[tuple[float, socket.socket, bytes]] = deque()  # in order of departure

    def run(self) -> None:
        """Forward until the process is killed."""
        while True:
            timeout = None
            if self._waiting:
                timeout = max(self._waiting[0][0] - time.monotonic(), 0.0)
            for port in select.select(self._ports, [], [], timeout)[0]:
                self._take(port)
            self._send_due()

    def _take(self, port: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                frame = port.recv(_LARGEST_FRAME)
            except BlockingIOError:
                return
            self._port_of[frame[_SOURCE_MAC]] = port
            if random.random() >= self._loss:
                self._waiting.append((time.monotonic() + self._delay_s, port, frame))

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, source, frame = self._waiting.popleft()
            target = self._port_of.get(frame[_MAC])
            targets = [target] if target is not None else self._ports
            for port in targets:
                if port is not source:
                    # A full shaper drops, as a full port of any switch does.
                    with contextlib.suppress(OSError):
                        port.send(frame)


def _open(device: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setblocking(False)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BYTES)
    port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BYTES)
    port.bind((device, _ETH_P_ALL))
    return port


def main() -> None:
    """Switch frames between the ports until the process is killed."""
    delay_ms, loss, *devices = sys.argv[1:]
    # Before the ranks, which fill every core: a delay is the link's, not the machine's.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    switch = _Switch([_open(device) for device in devices], float(delay_ms) / 1e3, float(loss))
    print("switching", flush=True)
    switch.run()


if __name__ == "__main__":
    main()
