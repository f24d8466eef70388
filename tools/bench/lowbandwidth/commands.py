"""Names and command lines of a laboratory, as plain data: this module runs nothing.

One namespace is the hub and holds a bridge; one for each rank holds ``eth0``, whose other end is a
port of that bridge. Both ends are shaped, so every rank has a full-duplex link of one rate::

    rank 0: eth0 [tbf] ---- [tbf] port0 --.
    rank 1: eth0 [tbf] ---- [tbf] port1 --+-- br0     (hub)

Delay and loss come from netem under the first tbf, or from `relay` in place of the bridge.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DEVICE",
    "Link",
    "Names",
    "address",
    "congestion_command",
    "create_commands",
    "owner_of",
    "relay_command",
    "shape_commands",
]

DEVICE = "eth0"
_BRIDGE = "br0"
_PREFIX = "muloco-lab"
_NAME = re.compile(rf"^{_PREFIX}-(\d+)-(\d+)-")
_VETH = ("type", "veth", "peer", "name")
_SUBNET = "10.213.0"  # seen inside the namespaces only

FRAME_BYTES = 1514  # MTU 1,500 and the Ethernet header; tbf and the interface counters count both
# Chosen: 10 frames. tbf's timer has nanoseconds, so it needs no more; a bucket that is full after
# every pause makes the first burst free, 15 kB against hundreds of kB that an exchange sends.
BURST_BYTES = 10 * FRAME_BYTES
# Chosen: long enough that three senders into one port (K = 4) seldom lose a packet while TCP finds
# its rate, short enough that it does find it: the queue of a rate for half a second, at least this.
_QUEUE_SECONDS = 0.5
_LEAST_QUEUE_BYTES = 100 * FRAME_BYTES


@dataclass(frozen=True, slots=True)
class Names:
    """Namespaces of one laboratory, named after the process that owns it.

    Attributes:
        pid: Process id of the owner.
        started: The owner's start time in clock ticks since boot, which tells a reused pid apart.
    """

    pid: int
    started: int

    @property
    def hub(self) -> str:
        """The namespace of the bridge."""
        return f"{_PREFIX}-{self.pid}-{self.started}-hub"

    def rank(self, rank: int) -> str:
        """The namespace of a rank."""
        return f"{_PREFIX}-{self.pid}-{self.started}-r{rank}"


@dataclass(frozen=True, slots=True)
class Link:
    """Shape of every rank's link, in each direction.

    Attributes:
        mbit: Rate in 10^6 bits of Ethernet frames a second; ``None`` leaves the link as it is.
        delay_ms: Delay added between two ranks, one way.
        loss: Share of frames between two ranks that is dropped.
    """

    mbit: float | None
    delay_ms: float = 0.0
    loss: float = 0.0

    @property
    def is_impaired(self) -> bool:
        """Whether frames are delayed or lost."""
        return bool(self.delay_ms or self.loss)

    @property
    def name(self) -> str:
        """Of the files that belong to it."""
        if self.mbit is None:
            return "unshaped"
        impaired = f"-{self.delay_ms:g}ms-{self.loss:g}lost" if self.is_impaired else ""
        return f"{self.mbit:g}mbit{impaired}"

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait in the shaper before it drops."""
        assert self.mbit is not None
        return max(int(self.mbit * 1e6 / 8 * _QUEUE_SECONDS), _LEAST_QUEUE_BYTES)


def owner_of(namespace: str) -> tuple[int, int] | None:
    """Return pid and start time of the owner, ``None`` for a namespace of somebody else."""
    match = _NAME.match(namespace)
    return (int(match.group(1)), int(match.group(2))) if match else None


def address(rank: int) -> str:
    """Return the address of a rank in its namespace."""
    return f"{_SUBNET}.{rank + 1}"


def create_commands(names: Names, ranks: int, *, bridge: bool = True) -> list[list[str]]:
    """Return the commands that build namespaces and unshaped links, and the bridge if wanted."""
    hub = names.hub
    commands = [["ip", "netns", "add", hub]]
    if bridge:
        commands += [
            ["ip", "-n", hub, "link", "add", _BRIDGE, "type", "bridge"],
            ["ip", "-n", hub, "link", "set", _BRIDGE, "up"],
        ]
    for rank in range(ranks):
        space, port = names.rank(rank), f"port{rank}"
        commands += [
            ["ip", "netns", "add", space],
            ["ip", "-n", space, "link", "set", "lo", "up"],
            ["ip", "-n", space, "link", "add", DEVICE, *_VETH, port, "netns", hub],
            # One packet is one frame: else the counters see the header of up to 45 frames once.
            ["ip", "-n", space, "link", "set", DEVICE, "gso_max_segs", "1"],
            ["ip", "-n", space, "addr", "add", f"{address(rank)}/24", "dev", DEVICE],
            ["ip", "-n", hub, "link", "set", port, *(("master", _BRIDGE) if bridge else ()), "up"],
            ["ip", "-n", space, "link", "set", DEVICE, "up"],
        ]
    return commands


def congestion_command(names: Names, rank: int, algorithm: str) -> list[str]:
    """Return the command that chooses how TCP looks for its rate in a namespace."""
    setting = f"net.ipv4.tcp_congestion_control={algorithm}"
    return ["ip", "netns", "exec", names.rank(rank), "sysctl", "-q", "-w", setting]


def relay_command(names: Names, ranks: int, link: Link) -> list[str]:
    """Return the command that switches frames between the ports, in place of the bridge."""
    script = [sys.executable, str(Path(__file__).with_name("relay.py"))]
    ports = [f"port{rank}" for rank in range(ranks)]
    impairment = [f"{link.delay_ms:g}", f"{link.loss:g}"]
    return ["ip", "netns", "exec", names.hub, *script, *impairment, *ports]


def shape_commands(names: Names, ranks: int, link: Link, *, netem: bool = True) -> list[list[str]]:
    """Return the commands that shape both ends of every rank's link, with netem or without."""
    commands = []
    for rank in range(ranks):
        for space, device in ((names.rank(rank), DEVICE), (names.hub, f"port{rank}")):
            tc, at = ["tc", "-n", space, "qdisc", "add", "dev", device], ["root"]
            if link.mbit is not None:
                bits = f"{link.mbit * 1e6:.0f}bit"
                queue = ["burst", f"{BURST_BYTES}b", "limit", f"{link.queue_bytes}b"]
                commands.append([*tc, *at, "handle", "1:", "tbf", "rate", bits, *queue])
                at = ["parent", "1:1"]
            if netem and link.is_impaired and device == DEVICE:  # each packet passes one of them
                impaired = ["delay", f"{link.delay_ms:g}ms", "loss", f"{link.loss:.4%}"]
                commands.append([*tc, *at, "handle", "2:", "netem", *impaired, "limit", "100000"])
    return commands
