"""What must hold before any library is imported, and how tests share a machine when two run at once.

``pytest -n 2`` runs two tests at a time. Those marked ``realtime`` (drivers at 200 Hz, the twin, DDS) mean
something only on a machine that does nothing else: they come last, and while a module of them runs, the
other workers wait. Plain ``pytest`` runs the same tests in the same order in one process.

A shared machine may still take the processor away for tenths of a second, whoever waits for whom. So a
test that fails gets one more try if it is ``realtime`` or ``by_the_clock``; the summary lists it as
``RERUN``. What is really broken fails both times. No other test gets one.
"""

import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...; nothing where all run in one process

# Each worker has a ROS domain of its own. Domains up to 101 keep clear of the ephemeral ports that Linux
# hands out (ROS 2 documentation).
domain = int(os.environ.get("ROS_DOMAIN_ID", 1 + os.getpid() % 100))
os.environ["ROS_DOMAIN_ID"] = str((domain + int(WORKER.removeprefix("gw") or 0)) % 102)
os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
os.environ.setdefault("RCUTILS_LOGGING_USE_STDOUT", "0")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# How long an example takes says nothing while another test shares the processor.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

MACHINE = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Open what the workers of a run lock: a file that is there anyway, and the same for all of them."""
    if WORKER and config.inipath is not None:
        config.stash[MACHINE] = os.open(config.inipath, os.O_RDONLY)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close it, which gives back the lock if a test was cut off."""
    if (machine := config.stash.get(MACHINE, None)) is not None:
        os.close(machine)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what needs the machine for itself after everything else; allow what goes by a clock two tries."""
    items.sort(key=is_realtime)
    for item in items:
        if is_realtime(item) or item.get_closest_marker("by_the_clock") is not None:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside pytest-timeout: waiting is not the test's time
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Run ordinary tests beside those of other workers, and a module's real-time tests alone.

    Alone from its first such test to its last: its fixtures (a twin, say) live on between its tests.
    """
    machine = item.config.stash.get(MACHINE, None)
    if machine is None:
        return (yield)
    alone = is_realtime(item)
    fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        if not (alone and nextitem is not None and nextitem.path == item.path):
            fcntl.flock(machine, fcntl.LOCK_UN)


def is_realtime(item: pytest.Item) -> bool:
    """Tell whether a test is marked ``realtime``."""
    return item.get_closest_marker("realtime") is not None
