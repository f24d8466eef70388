"""How much of an interval a replica trained: its weight where replicas are weighed by tokens."""

from dataclasses import asdict, dataclass

__all__ = ["Progress"]


@dataclass
class Progress:
    """Inner steps of a fragment since its last launch.

    Attributes:
        steps: All of them.
        trained: Those that changed parameters, each as the share of its tokens that counted.
    """

    steps: int = 0
    trained: float = 0.0

    def add(self, share: float) -> None:
        """Count one inner step, of which ``share`` was trained."""
        self.steps += 1
        self.trained += share

    def restart(self) -> None:
        """Count the steps of this interval so far as not trained: their result is gone."""
        self.trained = 0.0

    def take(self) -> float:
        """Return the trained share of the interval, in [0, 1], and begin the next one."""
        share = self.trained / self.steps
        self.steps, self.trained = 0, 0.0
        return share

    def state_dict(self) -> dict[str, float]:
        """Return the counts as plain numbers."""
        return asdict(self)
