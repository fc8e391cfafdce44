"""One ament_python package: colcon and pip both build it from here."""

from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ["simplevla", "policy_server", "sim_training", "robot_bridge", "calibration"]
SHARE = "share/simplevla"


def tree(folder: str) -> list[tuple[str, list[str]]]:
    """Return the data_files entries of every file below ``folder``, engines (caches) left out."""
    files = [p for p in Path(folder).rglob("*") if p.is_file() and "engines" not in p.parts]
    return [
        (f"{SHARE}/{parent}", [str(p) for p in sorted(files) if p.parent == parent])
        for parent in sorted({p.parent for p in files})
    ]


setup(
    # Here and not in setup.cfg: from there setuptools makes it an object that colcon cannot read back.
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=ROOMS + [f"{room}.*" for room in ROOMS]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/simplevla"]),
        (SHARE, ["package.xml"]),
        (f"{SHARE}/launch", sorted(glob("launch/*.launch.py"))),
        *tree("config"),
        *tree("urdf"),
        *tree("robot_pc"),
        *tree("bundles"),
    ],
)
