"""What passes between the policy that learns and the environments that it acts in. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Episode(NamedTuple):
    """One attempt to be made: ``member`` of the group that starts from the state of ``seed``."""

    seed: int
    member: int = 0


@dataclass(frozen=True)
class Looks:
    """What n environments show at the moment at which each needs its next chunk of actions.

    Attributes:
        episodes: (n, 2) int64, seed and member of each.
        turns: (n,) int64, how many looks each episode has had before this one.
        images: (n, n_cameras, 3, h, w) uint8 at the network's image size.
        proprio: (n, P) float32.
        prompts: (n,) int64, which of the run's prompts each was given.
    """

    episodes: NDArray[np.int64]
    turns: NDArray[np.int64]
    images: NDArray[np.uint8]
    proprio: NDArray[np.float32]
    prompts: NDArray[np.int64]

    def __len__(self) -> int:
        """Return n."""
        return len(self.turns)


class Answer(NamedTuple):
    """What the policy answered to n looks.

    Attributes:
        bins: (n, K, D) uint8, the actions.
        kept: (n, ...) what a trajectory keeps of each look in the place of its images; None to keep
            the images.
    """

    bins: NDArray[np.uint8]
    kept: NDArray[Any] | None = None


Act = Callable[[Looks], Answer]


@dataclass(frozen=True)
class Trajectory:
    """An episode that ended, in T looks.

    Attributes:
        seen: (T, ...) the images of each look, uint8, or what the policy kept in their place.
        proprio: (T, P) float32.
        prompt: which of the run's prompts it was given.
        bins: (T, K, D) uint8.
        actions: actions that were begun, up to and with the one that finished the task; at most T * K.
        success: the outcome reward.
        strategy: how it succeeded ("grasp" or "push"), empty if it did not.
        region: where the object started, empty if the task knows no regions.
        failure: why it failed, empty if it did not.
        log_probs: (T, K * D) float32 of the bins under the policy that sampled them, once computed.
        version: the iteration whose policy sampled it.
    """

    episode: Episode
    seen: NDArray[Any]
    proprio: NDArray[np.float32]
    prompt: int
    bins: NDArray[np.uint8]
    actions: int
    success: bool
    strategy: str = ""
    region: str = ""
    failure: str = ""
    log_probs: NDArray[np.float32] | None = field(default=None, compare=False)
    version: int = 0

    @property
    def looks(self) -> int:
        """T."""
        return len(self.bins)


class Environments(Protocol):
    """Many environments of one task, which play episodes with a policy.

    Attributes:
        seconds: seconds spent so far, by what for ("physics", "rendering", "inference", ...).
    """

    seconds: dict[str, float]

    @property
    def instructions(self) -> tuple[str, ...]:
        """The prompts of the run, in the order of ``Looks.prompts``."""
        ...

    def collect(self, episodes: Sequence[Episode], act: Act, *, horizon: int = 0) -> list[Trajectory]:
        """Play every episode to its end and return them, in the order of ``episodes``.

        An episode has failed after ``horizon`` actions; 0 leaves that to the environments.
        ``act`` is called with whatever looks are due together; its answer to a look depends on that
        look alone, so that the order in which environments get ready changes nothing.
        """
        ...
