"""Serving another bundle without a pause: load it beside the old one, prove it, let it answer.

Whatever goes wrong before the last step leaves the old policy answering. After it the old one is kept for
the first answers of the new one: should those fail, the old one gives them, and takes over again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from policy_server.served_policy import ServedPolicy
from simplevla.bundle import Bundle, Manifest, load_bundle
from simplevla.embodiment import require_same
from simplevla.errors import EmbodimentError, SimplevlaError

if TYPE_CHECKING:
    from policy_server.server import PolicyServer

_GOLDEN = 4
_END_S = 10.0

_log = logging.getLogger(__name__)


class SwapError(SimplevlaError):
    """A bundle was not promoted."""

    code = "swap_refused"


class HotSwap:
    """Promotes what lies in a bundle's folder when asked to. A context manager, with a thread of its own.

    Args:
        server: what serves.
        path: the folder, or a link to one; what is there when it is asked is what is loaded.
        open_policy: loads a bundle's engine; the parity certificate of an engine is checked there.
        report: told ``promoted`` or ``refused``.
    """

    def __init__(
        self,
        server: PolicyServer,
        path: Path,
        open_policy: Callable[[Bundle], ServedPolicy],
        report: Callable[[str], object] = _log.debug,
    ) -> None:
        self._server = server
        self._path = path
        self._open_policy = open_policy
        self._report = report
        self._asked = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hot-swap", daemon=True)

    def __enter__(self) -> HotSwap:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._asked.set()
        self._thread.join(_END_S)

    def ask(self) -> None:
        """Have the folder looked at, soon; safe from a signal."""
        self._asked.set()

    def _run(self) -> None:
        while self._asked.wait() and not self._ending.is_set():
            self._asked.clear()
            try:
                bundle = load_bundle(self._path.resolve())  # a link may move on while it is read
                if bundle.id == self._server.policy_id:
                    _log.info("%s holds the policy that is served already", self._path)
                    continue
                promote(self._server, bundle, self._open_policy(bundle))
            except Exception as error:  # whatever a bundle does, the old policy goes on
                expected = isinstance(error, SimplevlaError)
                _log.error("the old policy goes on: %s", error, exc_info=not expected)
                self._report("refused")
            else:
                self._report("promoted")


def promote(server: PolicyServer, bundle: Bundle, policy: ServedPolicy) -> None:
    """Let ``policy`` answer from now on, if it proves that it can.

    Raises:
        SimplevlaError: it cannot; nothing has changed.
    """
    require_swappable(server.manifest, policy.manifest)
    policy.warm_up()
    prove(bundle, policy)
    server.swap(policy)


def require_swappable(before: Manifest, after: Manifest) -> None:
    """Check that the clients of one policy can go on with another.

    Raises:
        EmbodimentError: it is for another robot, or needs cameras that they do not send.
    """
    require_same(after.embodiment, before.embodiment, have_is="the new bundle", want_is="the served one")
    more = set(after.cameras) - set(before.cameras)
    if more:
        raise EmbodimentError(
            f"the new policy needs the cameras {', '.join(sorted(more))} too, which clients do not send",
            "start the server anew with it",
        )


def prove(bundle: Bundle, policy: ServedPolicy) -> None:
    """Check that the policy computes what its engine did when it was compiled, and always the same.

    Raises:
        SwapError: it does not.
        SimplevlaError: it cannot answer.
    """
    from policy_server.engines import check_golden
    from policy_server.observations import plausible_observations

    check_golden(bundle, policy.session)
    for observation in plausible_observations(bundle.manifest, count=_GOLDEN, seed=0):
        first, again = (policy.answer(observation)[0].actions for _ in range(2))
        if not np.array_equal(first, again):
            raise SwapError("the new policy answers the same question differently", "report the bundle")
