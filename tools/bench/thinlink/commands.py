"""Names and command lines of a laboratory, as plain data: nothing here runs anything.

One namespace is the hub and holds a bridge; one for each rank holds ``eth0``, whose other end is a
port of that bridge. Both ends are shaped, so every rank has a full-duplex link of one rate::

    rank 0: eth0 [tbf] ---- [tbf] port0 --.
    rank 1: eth0 [tbf] ---- [tbf] port1 --+-- br0     (hub)
"""

import re
from dataclasses import dataclass

__all__ = [
    "DEVICE",
    "Link",
    "Names",
    "address",
    "congestion_command",
    "create_commands",
    "owner_of",
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
        pid: Of the owner.
        started: Its start time in clock ticks since boot, so that a reused pid is not mistaken.
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
    """What every rank's link is shaped to, in each direction.

    Attributes:
        mbit: Rate in 10^6 bits of Ethernet frames a second; ``None`` leaves the link as it is.
        delay_ms: One way, added by netem.
        loss: Share of packets that netem drops.
    """

    mbit: float | None
    delay_ms: float = 0.0
    loss: float = 0.0

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


def create_commands(names: Names, ranks: int) -> list[list[str]]:
    """Return the commands that build namespaces, bridge and unshaped links."""
    hub = names.hub
    commands = [
        ["ip", "netns", "add", hub],
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
            ["ip", "-n", hub, "link", "set", port, "master", _BRIDGE, "up"],
            ["ip", "-n", space, "link", "set", DEVICE, "up"],
        ]
    return commands


def congestion_command(names: Names, rank: int, algorithm: str) -> list[str]:
    """Return the command that chooses how TCP looks for its rate in a namespace."""
    setting = f"net.ipv4.tcp_congestion_control={algorithm}"
    return ["ip", "netns", "exec", names.rank(rank), "sysctl", "-q", "-w", setting]


def shape_commands(names: Names, ranks: int, link: Link) -> list[list[str]]:
    """Return the commands that shape both ends of every rank's link."""
    commands = []
    for rank in range(ranks):
        for space, device in ((names.rank(rank), DEVICE), (names.hub, f"port{rank}")):
            tc, at = ["tc", "-n", space, "qdisc", "add", "dev", device], ["root"]
            if link.mbit is not None:
                bits = f"{link.mbit * 1e6:.0f}bit"
                queue = ["burst", f"{BURST_BYTES}b", "limit", f"{link.queue_bytes}b"]
                commands.append([*tc, *at, "handle", "1:", "tbf", "rate", bits, *queue])
                at = ["parent", "1:1"]
            if (link.delay_ms or link.loss) and device == DEVICE:  # each packet passes one of them
                impaired = ["delay", f"{link.delay_ms:g}ms", "loss", f"{link.loss:.4%}"]
                commands.append([*tc, *at, "handle", "2:", "netem", *impaired, "limit", "100000"])
    return commands
