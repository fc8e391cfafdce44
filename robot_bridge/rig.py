"""The rig: which bus, which serial number and, for the twin, which ports stand behind an embodiment.

An embodiment says what a robot is; a rig says where this one is plugged in. A rig whose ``twin``
is set has the twin process (:mod:`robot_bridge.twin.process`) in the place of the metal.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta

from simplevla.cli import require_choice
from simplevla.config import Config, load_yaml
from simplevla.embodiment import Embodiment, Vec3, load_embodiment
from simplevla.errors import ConfigError
from simplevla.files import share_dir, write_atomic

TWIN_BUS = "simplevla_twin"
PLACEHOLDER = "FILL-IN"
_LOOPBACK = re.compile(r"127\.0\.0\.1:\d{1,5}")
_CONTROL = re.compile(r"tcp://127\.0\.0\.1:\d{1,5}")


class CanPort(Config):
    """Where one arm's bus is.

    Attributes:
        interface: python-can's name of the kind of bus: ``socketcan`` for a USB adapter, ``slcan``
            for a serial one, ``simplevla_twin`` for the twin.
        channel: ``can0`` and the like; for the twin ``127.0.0.1:<UDP port>``.
        bitrate: bit/s; a Piper speaks 1 Mbit/s. With socketcan the system sets the rate.
        dh: how the arm counts joints 2 and 3: ``new``, or ``old`` for an arm whose zero pose the vendor's
            manual gives as (55, 0, 205) mm instead of (56.128, 0, 213.266) mm.
    """

    interface: Annotated[str, Meta(min_length=1)]
    channel: Annotated[str, Meta(min_length=1)]
    bitrate: Annotated[int, Meta(gt=0)] = 1_000_000
    dh: Literal["new", "old"] = "new"


class TwinSettings(Config):
    """How to reach the twin process.

    Attributes:
        control: ZMQ address of its control endpoint, on loopback.
        shared_memory: prefix of the names of its shared-memory frame slots.
        task: the scene that is set up at the start.
    """

    control: str = "tcp://127.0.0.1:47000"
    shared_memory: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]{1,40}$")] = "simplevla"
    task: str = "move_can_pot"

    def __post_init__(self) -> None:
        if not _CONTROL.fullmatch(self.control):
            raise ValueError(f"twin.control is {self.control!r}, not tcp://127.0.0.1:<port>")


class Rig(Config):
    """One robot as it is plugged in.

    Attributes:
        name: goes into the index of trials.
        embodiment: name of the embodiment in ``config/embodiment/``.
        arms: {arm of the embodiment: its bus}.
        cameras: {camera of the embodiment: serial number}.
        twin: set when the twin takes the place of the metal.
        workspace_m: lowest and highest corner of the box in which the tools may be, in the world frame;
            left out, they may be anywhere that their joints, the table and each other allow.
    """

    name: Annotated[str, Meta(min_length=1)]
    embodiment: str
    arms: dict[str, CanPort]
    cameras: dict[str, str]
    twin: TwinSettings | None = None
    workspace_m: tuple[Vec3, Vec3] | None = None

    def __post_init__(self) -> None:
        if self.workspace_m is not None:
            low, high = self.workspace_m
            if not all(a < b for a, b in zip(low, high, strict=True)):
                raise ValueError(
                    f"workspace_m is {self.workspace_m}: its second corner is not the higher one"
                )
        for kind, values in (
            ("bus", [(port.interface, port.channel) for port in self.arms.values()]),
            ("serial number", [s for s in self.cameras.values() if not s.startswith(PLACEHOLDER)]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"one {kind} is given twice: {values}")
        for arm, port in self.arms.items():
            if (port.interface == TWIN_BUS) != (self.twin is not None):
                raise ValueError(
                    f"arms.{arm}.interface is {port.interface!r}, and the rig "
                    + ("has a twin section" if self.twin else "has no twin section")
                )
            if self.twin is not None and not _LOOPBACK.fullmatch(port.channel):
                raise ValueError(f"arms.{arm}.channel is {port.channel!r}, not 127.0.0.1:<port>")

    @property
    def is_twin(self) -> bool:
        """Whether the twin takes the place of the metal."""
        return self.twin is not None

    def load_embodiment(self) -> Embodiment:
        """Return the embodiment that this rig plugs in, with the arms that this rig has."""
        embodiment = load_embodiment(self.embodiment)
        arms = tuple(arm for arm in embodiment.arms if arm.name in self.arms)
        return embodiment if arms == embodiment.arms else msgspec.structs.replace(embodiment, arms=arms)

    def with_arms(self, names: Sequence[str]) -> Rig:
        """Return this rig with the arms ``names`` alone; with all of them if none is named.

        Raises:
            ConfigError: one is unknown.
        """
        for name in names:
            require_choice("arm", name, list(self.arms))
        arms = {name: port for name, port in self.arms.items() if not names or name in names}
        return msgspec.structs.replace(self, arms=arms)


def named(text: str) -> list[str]:
    """Return the names that ``text`` separates by commas."""
    return [name for name in text.replace(" ", "").split(",") if name]


def load_rig(name: str) -> Rig:
    """Return the rig in ``config/rig/<name>.yaml``, or in a file if ``name`` ends in .yaml.

    Raises:
        ConfigError: no such rig ships, the file breaks the schema, an arm or a camera of the
            embodiment is missing or unknown, or a serial number is still the placeholder.
        EmbodimentError: the rig's embodiment does not ship.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        folder = share_dir() / "config/rig"
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        if name not in known:
            raise ConfigError(
                f"unknown rig {name!r}", f"choose one of: {', '.join(known)}; or a .yaml file"
            )
        path = folder / f"{name}.yaml"
    rig = load_yaml(path, Rig)
    embodiment = load_embodiment(rig.embodiment)
    for kind, have, want in (
        ("arm", set(rig.arms), {arm.name for arm in embodiment.arms}),
        ("camera", set(rig.cameras), {camera.name for camera in embodiment.cameras}),
    ):
        if have != want:
            raise ConfigError(
                f"{path}: {kind}s are {sorted(have)}, and {embodiment.name} has {sorted(want)}",
                f"name each {kind} of the embodiment once",
            )
    for camera, serial in rig.cameras.items():
        if not serial or serial.startswith(PLACEHOLDER):
            raise ConfigError(
                f"{path}: fill in the serial number of camera {camera}",
                "read it from the camera's label or with: rs-enumerate-devices -s",
            )
    return rig


def save_rig(rig: Rig, path: Path) -> None:
    """Write ``rig`` as YAML, so that another process can load it by path."""
    write_atomic(path, yaml.safe_dump(msgspec.to_builtins(rig), sort_keys=False).encode())


def with_free_ports(rig: Rig) -> Rig:
    """Return a twin's rig moved to ports and names of its own, so that two twins do not meet.

    Raises:
        ConfigError: ``rig`` is not a twin's.
    """
    if rig.twin is None:
        raise ConfigError(f"rig {rig.name!r} is not a twin's", "use the rig: twin")
    ports = _free_ports(len(rig.arms) + 1)
    arms = {
        arm: msgspec.structs.replace(can, channel=f"127.0.0.1:{port}")
        for (arm, can), port in zip(rig.arms.items(), ports[1:], strict=True)
    }
    twin = msgspec.structs.replace(
        rig.twin, control=f"tcp://127.0.0.1:{ports[0]}", shared_memory=f"simplevla_{os.getpid()}_{ports[0]}"
    )
    return msgspec.structs.replace(rig, arms=arms, twin=twin)


def _free_ports(count: int) -> list[int]:
    """Return ports that are free for TCP and for UDP now."""
    held: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            held += [tcp, udp]
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            ports.append(tcp.getsockname()[1])
    finally:
        for handle in held:
            handle.close()
    return ports
