"""``simplevla doctor``: what this machine has and lacks for each role, and what to do about it.

A check that imports a vendor's library runs in a process of its own: one that crashes or hangs is a
finding then, not the end of the doctor.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from simplevla.cli import Command
from simplevla.errors import SimplevlaError

Role = Literal["laptop", "robot-pc", "gpu-server"]
Status = Literal["ok", "warn", "missing", "-"]
ROLES: dict[Role, str] = {
    "laptop": "the whole stack on the twin: no robot, no ROS installation, no GPU",
    "robot-pc": "drives real arms and cameras",
    "gpu-server": "trains and serves policies",
}
_ALL: tuple[Role, ...] = ("laptop", "robot-pc", "gpu-server")
_EPILOG = """\
roles:
{roles}

examples:
  simplevla doctor                       what this machine could be
  simplevla doctor --role robot-pc       is it ready to drive arms? exit status 0 if so, else 1
  simplevla doctor --json                the same for a program
"""

# Where the module of a distribution is not called after it.
_MODULES = {
    "pyyaml": "yaml",
    "opencv-python": "cv2",
    "pyzmq": "zmq",
    "python-can": "can",
    "jinja2": "jinja2",
}
_EXTRAS_OF: dict[str, tuple[Role, ...]] = {
    "": _ALL,
    "robot": ("laptop", "robot-pc"),
    "serve": ("laptop", "gpu-server"),
    "compile": ("laptop", "gpu-server"),
    "sim": ("laptop", "gpu-server"),
    "train": ("laptop", "gpu-server"),
    "calibration": ("robot-pc",),
}
_CAN_BUS = 280  # ARPHRD_CAN of linux/if_arp.h, as /sys/class/net/*/type shows it
_CAN_BITRATE = 1_000_000  # of a Piper's bus
_MESA_NEEDED = (24, 3)
_SERVER_PORT = 5555
_PROBE_SECONDS = 60


@dataclass(frozen=True)
class Finding:
    """What one check saw: whether it suffices, in words what is there, and what to do if it does not."""

    good: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """One question to the machine.

    Attributes:
        required: roles that cannot work without it.
        useful: roles that are better with it; a bad finding is a warning there.
    """

    name: str
    look: Callable[[], Finding]
    required: tuple[Role, ...] = ()
    useful: tuple[Role, ...] = ()

    def status(self, role: Role, finding: Finding) -> Status:
        """Return what ``finding`` means to ``role``; ``-`` if it does not matter there."""
        if role not in self.required + self.useful:
            return "-"
        if finding.good:
            return "ok"
        return "missing" if role in self.required else "warn"


@dataclass(frozen=True)
class Row:
    """One check's finding, and what it means to each role that was asked for."""

    name: str
    found: str
    remedy: str
    status: dict[str, Status]


@dataclass(frozen=True)
class Report:
    """The findings, and for each role whether nothing that it requires is missing."""

    complete: dict[str, bool]
    checks: list[Row]


def diagnose(checks: Sequence[Check], roles: Sequence[Role]) -> Report:
    """Make those of ``checks`` that matter to ``roles``."""
    asked = [c for c in checks if set(roles) & {*c.required, *c.useful}]
    with ThreadPoolExecutor(max_workers=2) as pool:
        findings = list(pool.map(_look, asked))
    rows = [
        Row(
            check.name,
            finding.found,
            "" if finding.good else finding.remedy,
            {role: check.status(role, finding) for role in roles},
        )
        for check, finding in zip(asked, findings, strict=True)
    ]
    return Report({role: all(row.status[role] != "missing" for row in rows) for role in roles}, rows)


def machine_checks() -> list[Check]:
    """Return every check there is, for this machine."""
    sim: tuple[Role, ...] = ("laptop", "gpu-server")
    bridge: tuple[Role, ...] = ("laptop", "robot-pc")
    return [
        Check("python", look_at_python, required=_ALL),
        *(
            Check(f"extra {extra}" if extra else "core libraries", _extra_look(extra), required=roles)
            for extra, roles in _EXTRAS_OF.items()
        ),
        Check("ROS 2", look_at_ros, required=bridge),
        Check("ros2 launch", look_at_ros2_command, useful=("robot-pc",)),
        Check("libusb", look_at_libusb, required=bridge),
        Check("rendering", look_at_rendering, required=sim),
        Check("shipped policy", look_at_bundle, required=("laptop",), useful=("robot-pc", "gpu-server")),
        Check("CAN interfaces", look_at_can, required=("robot-pc",)),
        Check("RealSense cameras", look_at_cameras, required=("robot-pc",)),
        Check("NVIDIA GPU", look_at_gpu, required=("gpu-server",)),
        Check("TensorRT", look_at_tensorrt, useful=("gpu-server",)),
        Check("cores and memory", look_at_size, useful=_ALL),
        Check("free disk", look_at_disk, useful=_ALL),
        Check("free ports", look_at_ports, useful=sim),
    ]


def look_at_python() -> Finding:
    """Python must be one that every pinned wheel exists for."""
    good = (3, 10) <= sys.version_info[:2] <= (3, 12)
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(good, version, "use Python 3.10, 3.11 or 3.12: PYTHON=python3.11 make setup")


def look_at_extra(extra: str, requirements: Iterable[str]) -> Finding:
    """Every library of ``extra`` must be installed; '' means what is needed without any extra.

    Args:
        extra: name of the extra in setup.cfg.
        requirements: the package's requirements as its metadata has them, such as
            ``pyzmq>=26; extra == "serve"``.
    """
    have, lack = [], []
    for name in _distributions(extra, requirements):
        if find_spec(_MODULES.get(name.lower(), name.replace("-", "_"))) is None:
            lack.append(name)
            continue
        version = "of the system"  # a module that the system's packages brought
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
        have.append(f"{name} {version}")
    wanted = f'"simplevla[{extra}]"' if extra else "simplevla"
    remedy = f"install {', '.join(lack)}: make setup (in a checkout) or pip install {wanted}"
    return Finding(not lack, f"no {', '.join(lack)}" if lack else ", ".join(have), remedy)


def look_at_ros() -> Finding:
    """A node must start: rclpy, its middleware and the messages, from an installation or from wheels."""
    if find_spec("rclpy") is None:
        remedy = "source /opt/ros/<distro>/setup.bash, or where there is no ROS: make setup"
        return Finding(False, "no rclpy", remedy)
    good, text = probe(
        "import rclpy, sensor_msgs.msg, trajectory_msgs.msg, diagnostic_msgs.msg, std_srvs.srv\n"
        "rclpy.init(); node = rclpy.create_node('simplevla_doctor')\n"
        "print(rclpy.get_rmw_implementation_identifier()); node.destroy_node(); rclpy.shutdown()"
    )
    flavour = (
        f"installed, {os.environ['ROS_DISTRO']}" if "ROS_DISTRO" in os.environ else "of unknown origin"
    )
    with contextlib.suppress(metadata.PackageNotFoundError):
        flavour = f"wheels, rclpy {metadata.version('ros-rclpy')}"
    return Finding(
        good, f"{flavour}: {text}", "rclpy does not start a node: reinstall it, or source your ROS again"
    )


def look_at_ros2_command() -> Finding:
    """`ros2 launch` starts the bridge on a robot PC; `simplevla up` does the same without it."""
    path = shutil.which("ros2")
    return Finding(
        path is not None, path or "none", "start the bridge with: simplevla up (or install ROS 2)"
    )


def look_at_libusb() -> Finding:
    """pyrealsense2 loads libusb when it is imported."""
    try:
        ctypes.CDLL("libusb-1.0.so.0")
    except OSError:
        return Finding(False, "none", "apt-get install libusb-1.0-0")
    return Finding(True, "libusb-1.0")


def look_at_rendering() -> Finding:
    """SAPIEN must draw one small picture, on a GPU or with Mesa's software renderer."""
    mesa = _mesa_version()
    label = f"Mesa {mesa}" if mesa else "no Mesa package seen"
    if find_spec("sapien") is None:
        return Finding(False, "no sapien", 'make setup, or pip install "simplevla[sim]"')
    good, text = probe(_RENDER, extra_env={"LP_NUM_THREADS": "1"})
    needed = ".".join(map(str, _MESA_NEEDED))
    old = mesa and tuple(int(part) for part in re.findall(r"\d+", mesa)[:2]) < _MESA_NEEDED
    why = f"Mesa {mesa} is too old" if old else "no Vulkan driver draws"
    remedy = (
        f"{why}: install mesa-vulkan-drivers {needed} or newer (make setup does), or a GPU's Vulkan driver"
    )
    return Finding(good, f"{text} ({label})", remedy)


_RENDER = """
import sapien
scene = sapien.Scene()
scene.set_ambient_light([1, 1, 1])
scene.add_ground(0)
camera = scene.add_camera("probe", 16, 16, 1.0, 0.01, 10)
camera.entity.set_pose(sapien.Pose([0, 0, 1], [0.7071068, 0, 0.7071068, 0]))
scene.step(); scene.update_render(); camera.take_picture()
assert camera.get_picture("Color")[..., :3].max() > 0, "the picture is black"
print("a picture was drawn by", scene.render_system.device.name)
"""


def look_at_bundle() -> Finding:
    """The policy that ships must be whole."""
    from simplevla.bundle import load_bundle
    from simplevla.files import share_dir

    try:
        bundle = load_bundle(share_dir() / "bundles/move_can_pot")
    except SimplevlaError as error:
        return Finding(False, error.message, error.remedy)
    return Finding(True, f"{bundle.manifest.name} {bundle.id[:12]}, every hash agrees")


def look_at_can(net: Path = Path("/sys/class/net")) -> Finding:
    """A CAN interface must be up, at the bit rate of a Piper's bus where that can be read."""
    found, usable = [], 0
    for interface in sorted(net.iterdir()) if net.is_dir() else []:
        if _read(interface / "type") != str(_CAN_BUS):
            continue
        up = int(_read(interface / "flags") or "0", 16) & 1  # IFF_UP
        rate = _bitrate(interface.name)
        usable += bool(up) and rate in (None, _CAN_BITRATE)
        found.append(f"{interface.name} {'up' if up else 'down'}{f' at {rate} bit/s' if rate else ''}")
    remedy = (
        "plug in the USB-CAN adapters, then for each: "
        f"sudo ip link set can0 down; sudo ip link set can0 up type can bitrate {_CAN_BITRATE}"
    )
    return Finding(usable > 0 and usable == len(found), ", ".join(found) or "none", remedy)


def look_at_cameras() -> Finding:
    """A RealSense must be plugged in, on USB 3."""
    good, text = probe(
        "import pyrealsense2 as rs\n"
        "def say(d):\n"
        "    info = rs.camera_info\n"
        "    return ' '.join(d.get_info(i) for i in (info.name, info.serial_number)) + ' on USB ' + (\n"
        "        d.get_info(info.usb_type_descriptor) if d.supports(info.usb_type_descriptor) else '?')\n"
        "print('; '.join(map(say, rs.context().query_devices())) or 'none')"
    )
    slow = "on USB 2" in text
    remedy = (
        "use a USB 3 port and cable"
        if slow
        else "plug the camera in (and install librealsense's udev rules)"
    )
    return Finding(good and text != "none" and not slow, text, remedy)


def look_at_gpu() -> Finding:
    """nvidia-smi must list a GPU."""
    remedy = "install the NVIDIA driver (nvidia-smi must list the GPU)"
    if shutil.which("nvidia-smi") is None:
        return Finding(False, "none (no nvidia-smi)", remedy)
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    good, text = _run(query, timeout_s=20)
    return Finding(good, text, remedy)


def look_at_tensorrt() -> Finding:
    """TensorRT makes serving faster; without it, ONNX Runtime or torch serve."""
    remedy = 'pip install "simplevla[gpu]"; without it: simplevla serve --backend onnxruntime or torch'
    if find_spec("tensorrt") is None:
        return Finding(False, "none", remedy)
    good, text = probe("import tensorrt; print(tensorrt.__version__)")
    return Finding(good, text, remedy)


def look_at_size() -> Finding:
    """Two cores and 6 GiB run the twin, the server and the bridge together."""
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    good = cores >= 2 and memory_gib >= 6
    return Finding(
        good,
        f"{cores} cores, {memory_gib:.0f} GiB",
        "expect less than real time: 2 cores and 6 GiB are the least",
    )


def look_at_disk(folder: Path | None = None) -> Finding:
    """A run of trials, a CUDA build of torch and a compiled engine fit in 10 GiB."""
    free_gib = shutil.disk_usage(folder or Path.cwd()).free / 2**30
    return Finding(
        free_gib >= 10, f"{free_gib:.0f} GiB here", "free some: runs/ of past trials are the usual place"
    )


def look_at_ports(ports: Sequence[int] | None = None) -> Finding:
    """The server's and the twin's ports on loopback must be free."""
    wanted = _ports() if ports is None else ports
    taken = [port for port in wanted if not _can_bind(port)]
    found = f"taken: {', '.join(map(str, taken))}" if taken else f"{', '.join(map(str, wanted))} are free"
    return Finding(not taken, found, "stop what listens there (is another twin or server running?)")


def probe(
    code: str, *, timeout_s: float = _PROBE_SECONDS, extra_env: dict[str, str] | None = None
) -> tuple[bool, str]:
    """Run ``code`` in a Python of its own; return whether it ended well, and its last line."""
    return _run([sys.executable, "-c", code], timeout_s=timeout_s, extra_env=extra_env)


def _run(
    command: Sequence[str], *, timeout_s: float, extra_env: dict[str, str] | None = None
) -> tuple[bool, str]:
    env = {**os.environ, **(extra_env or {})}
    try:
        done = subprocess.run(
            command,
            env=env,
            timeout=timeout_s,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer in {timeout_s:.0f} s"
    except OSError as error:
        return False, str(error)
    if done.returncode < 0:
        return False, f"crashed (signal {-done.returncode})"
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1].strip() if lines else f"exit status {done.returncode}"


def _look(check: Check) -> Finding:
    """Make one check; one that raises is a bad finding of that check alone."""
    try:
        return check.look()
    except Exception as error:  # the other checks are still worth making
        return Finding(False, f"{type(error).__name__}: {error}", "this check itself failed: report it")


def _extra_look(extra: str) -> Callable[[], Finding]:
    return lambda: look_at_extra(extra, metadata.requires("simplevla") or [])


def _distributions(extra: str, requirements: Iterable[str]) -> list[str]:
    """Return the names in ``requirements`` that ``extra`` asks for."""
    names = []
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        of = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if (of.group(1) if of else "") == extra:
            names.append(re.split(r"[\s<>=!~\[(]", wanted.strip(), maxsplit=1)[0])
    return names


def _mesa_version() -> str:
    """Return the version of the installed Mesa Vulkan drivers on Debian and Ubuntu, '' if unknown."""
    if shutil.which("dpkg-query") is None:
        return ""
    good, text = _run(["dpkg-query", "-W", "-f", "${Version}", "mesa-vulkan-drivers"], timeout_s=10)
    return text if good and text[:1].isdigit() else ""


def _bitrate(interface: str) -> int | None:
    """Return the bit rate of a CAN interface, None where iproute2 cannot tell."""
    if shutil.which("ip") is None:
        return None
    good, text = _run(["ip", "-details", "-json", "link", "show", interface], timeout_s=5)
    try:
        return int(json.loads(text)[0]["linkinfo"]["info_data"]["bittiming"]["bitrate"]) if good else None
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _ports() -> list[int]:
    """Return the server's port and those that the twin's rig names."""
    import yaml

    from simplevla.files import share_dir

    text = (share_dir() / "config/rig/twin.yaml").read_text(encoding="utf-8")
    rig = yaml.safe_load(text)
    addresses = [rig["twin"]["control"], *(arm["channel"] for arm in rig["arms"].values())]
    return [_SERVER_PORT, *sorted(int(address.rpartition(":")[2]) for address in addresses)]


def _can_bind(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe_socket:
            if kind == socket.SOCK_STREAM:
                probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe_socket.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG.format(roles="\n".join(f"  {name:<11} {text}" for name, text in ROLES.items()))
    parser.add_argument("--role", choices=list(ROLES), help="check for this role alone (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _main(args: argparse.Namespace) -> int:
    roles: list[Role] = [args.role] if args.role else list(ROLES)
    report = diagnose(machine_checks(), roles)
    print(json.dumps(asdict(report), indent=2) if args.json else describe(report))
    # Asked for no role, any role that the machine can play is good news enough.
    return 0 if any(report.complete.values()) else 1


def describe(report: Report) -> str:
    """Return the report as a table, then what to do, then one line a role."""
    roles = list(report.complete)
    width = max((len(row.name) for row in report.checks), default=0)
    lines = [" " * width + "  " + "  ".join(f"{role:<10}" for role in roles)]
    for row in report.checks:
        cells = "  ".join(f"{row.status[role]:<10}" for role in roles)
        lines.append(f"{row.name:<{width}}  {cells}  {row.found}")
    to_do = [f"  {row.name}: {row.remedy}" for row in report.checks if row.remedy]
    if to_do:
        lines += ["", "what to do:", *to_do]
    lines += [""] + [
        f"{role}: {'complete' if ok else 'NOT complete'}" for role, ok in report.complete.items()
    ]
    return "\n".join(lines)


COMMAND = Command("say what this machine has and lacks for each role, and what to do", _configure, _main)
