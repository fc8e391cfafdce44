"""The package as people install it: with colcon on a robot PC, and with pip from a checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from xml.etree import ElementTree

import pytest

from simplevla import __version__

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["simplevla", "policy_server", "sim_training", "robot_bridge", "calibration"]
DATA = ["config", "urdf", "bundles", "launch", "robot_pc", "resource"]
FILES = ["setup.py", "setup.cfg", "pyproject.toml", "package.xml", "README.md", "LICENSE"]
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "engines", "*.egg-info")


@pytest.fixture
def checkout(tmp_path):
    """Return a copy of what the package is made of, so that no build writes into the real one."""
    folder = tmp_path / "src" / "simplevla"
    for name in ROOMS + DATA:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_BEHIND)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def call(command, **options):
    """Run ``command`` and return what it printed; a failure shows all of it."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def relative_files(folder):
    """Return every file below ``folder``, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_colcon_builds_an_ament_package(checkout, tmp_path):
    environment = {**os.environ, "AMENT_PREFIX_PATH": "", "COLCON_HOME": str(tmp_path / "colcon")}
    out = call(
        [sys.executable, "-m", "colcon", "build", "--merge-install"],
        cwd=checkout.parent.parent,
        env=environment,
    )
    # A wrong package.xml makes colcon fall back to a plain Python build that ROS does not find.
    assert "WARNING" not in out
    prefix = checkout.parent.parent / "install"
    assert (prefix / "share/ament_index/resource_index/packages/simplevla").is_file()
    share = prefix / "share/simplevla"
    assert (share / "package.xml").is_file()
    assert (share / "hook/ament_prefix_path.sh").is_file()
    for name in ("config", "urdf", "bundles", "launch", "robot_pc"):
        assert relative_files(share / name) == relative_files(checkout / name), name
    command = prefix / "lib/simplevla/simplevla"  # where `ros2 run simplevla simplevla` looks
    assert os.access(command, os.X_OK)

    code = "from simplevla.files import share_dir; print(share_dir())"
    python_path = next(prefix.glob("lib/python3.*/site-packages"))
    environment = {**os.environ, "PYTHONPATH": str(python_path), "AMENT_PREFIX_PATH": str(prefix)}
    assert call([sys.executable, "-c", code], cwd=tmp_path, env=environment).strip() == str(share)


def test_pip_installs_the_command_and_its_data(checkout, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    # The third-party libraries come from this test's own environment.
    site = next(environment.glob("lib/python3.*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    call([*pip, "--no-deps", "--no-build-isolation", "--no-index", checkout], cwd=tmp_path)

    help_text = call([environment / "bin/simplevla", "--help"], cwd=tmp_path)
    assert "doctor" in help_text
    where = (
        "import simplevla; from simplevla.files import share_dir; print(simplevla.__file__, share_dir())"
    )
    module, share = call([python, "-c", where], cwd=tmp_path).split()
    assert Path(module).is_relative_to(site)
    assert Path(share) == environment / "share/simplevla"
    for name in ("config", "urdf", "bundles", "launch", "robot_pc"):
        assert relative_files(Path(share) / name) == relative_files(checkout / name), name


def test_ros_and_python_agree_on_name_and_version():
    package = ElementTree.parse(ROOT / "package.xml").getroot()  # noqa: S314 - our own file
    assert package.findtext("name") == "simplevla"
    assert package.findtext("version") == __version__
    assert package.findtext("export/build_type") == "ament_python"
    assert "@" in package.find("maintainer").get("email")


def test_every_ros_package_that_is_imported_is_declared():
    package = ElementTree.parse(ROOT / "package.xml").getroot()  # noqa: S314 - our own file
    declared = {element.text for element in package.findall("exec_depend")}
    sources = [*(ROOT / "robot_bridge").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    names = {
        name
        for path in sources
        for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE)
    }
    ros = {
        name for name in names if re.fullmatch(r"rclpy|launch|launch_ros|\w+_(msgs|srvs|interfaces)", name)
    }
    assert ros
    assert ros <= declared
