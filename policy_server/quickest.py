"""Who computes unless told otherwise: the quickest of the engines that are certified here.

Which runtime is quicker depends on network and processor, and a second of measuring before the server is
ready tells it for certain. Nothing is remembered, so nothing can be out of date.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from policy_server.backends import CPU_BACKENDS, open_session
from policy_server.backends.base import Session, SessionOptions
from policy_server.served_policy import example_observation
from policy_server.timing import interleaved
from simplevla.bundle import Bundle
from simplevla.errors import SimplevlaError
from simplevla.policy.processor import PolicyProcessor

_ROUNDS = 9
_WARM_UP_ROUNDS = 3

_log = logging.getLogger(__name__)


def open_quickest(
    bundle: Bundle,
    options: SessionOptions | None = None,
    *,
    precision: str = "fp32",
    backends: Sequence[str] = CPU_BACKENDS,
    like: str = "",
) -> Session:
    """Return the network of ``bundle`` in the back end that answers it soonest on this machine, now.

    Args:
        bundle: the policy.
        options: how a session may use the machine.
        precision: of the engines.
        backends: which to choose from; those without a certified engine are left out.
        like: the one to take without measuring, if it has an engine: another server is busy with it.

    Raises:
        SimplevlaError: what the first of them says, if none can be opened.
    """
    sessions: dict[str, Session] = {}
    refusals: list[SimplevlaError] = []
    for name in sorted(backends, key=lambda name: name != like):
        try:
            sessions[name] = open_session(bundle, name, options, precision=precision)
        except SimplevlaError as error:
            _log.debug("without %s: %s", name, error)
            refusals.append(error)
        if name == like and name in sessions:
            return sessions[name]
    if not sessions:
        raise refusals[0]
    if len(sessions) == 1:
        return next(iter(sessions.values()))
    question = PolicyProcessor.from_bundle(bundle).inputs(example_observation(bundle.manifest))
    asks = {name: session.run for name, session in sessions.items()}
    times = interleaved(asks, [question], _ROUNDS, warm_up_rounds=_WARM_UP_ROUNDS)
    medians_ms = {name: float(np.median(values)) for name, values in times.items()}
    best = min(medians_ms, key=medians_ms.__getitem__)
    _log.info("%s answers soonest: %s", best, ", ".join(f"{n} {ms:.1f} ms" for n, ms in medians_ms.items()))
    return sessions[best]
