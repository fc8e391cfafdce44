"""Keys: made once, kept private, and without the right ones nobody gets a word in."""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from policy_server.address import require_local
from policy_server.client import ClientKeys, PolicyClient
from policy_server.keys import (
    ServerKeys,
    allow_client,
    forget_client,
    keys_for,
    known_clients,
    make_keys,
    trust_server,
)
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.cli import main
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError, UnavailableError
from simplevla.observation import Observation

Observe = Callable[..., Observation]
Serving = Callable[..., AbstractContextManager[PolicyServer]]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The keys of a server, and those of a robot that it knows."""
    server, robot = tmp_path / "server", tmp_path / "robot"
    trust_server(robot, make_keys(server, "server"))
    allow_client(server, make_keys(robot, "robot"))
    return server, robot


def test_secret_keys_are_readable_by_their_user_alone(folders: tuple[Path, Path]) -> None:
    server, robot = folders
    for secret in (server / "server.secret", robot / "robot.secret"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.stat().st_mode) == 0o700
    assert not (robot / "server.secret").exists()
    assert known_clients(server) == ["robot"]


def test_with_keys_a_robot_is_answered_by_either_way(
    folders: tuple[Path, Path],
    policy: ServedPolicy,
    embodiment: Embodiment,
    observe: Observe,
    serving: Serving,
) -> None:
    server_folder, robot = folders
    with serving(policy, keys=ServerKeys.load(server_folder)) as server:
        for local, sealed, transport in (
            (False, False, "network"),
            (False, True, "network, sealed"),
            (True, True, "shared memory"),
        ):
            with PolicyClient(
                server.address,
                embodiment=embodiment,
                timeout_s=10,
                keys=ClientKeys.load(robot, "robot"),
                local=local,
                sealed=sealed,
            ) as client:
                assert client.transport == transport
                assert client.act(observe()).chunk.length == 3


def test_without_the_right_keys_nobody_gets_a_word_in(
    folders: tuple[Path, Path],
    tmp_path: Path,
    policy: ServedPolicy,
    embodiment: Embodiment,
    serving: Serving,
) -> None:
    server_folder, robot = folders
    stranger, fooled = tmp_path / "stranger", tmp_path / "fooled"
    make_keys(stranger, "robot")
    trust_server(stranger, server_folder / "server.public")
    make_keys(fooled, "impostor")
    trust_server(robot, robot / "server.public")
    with serving(policy, keys=ServerKeys.load(server_folder)) as server:

        def ask(keys: ClientKeys | None) -> None:
            with PolicyClient(server.address, embodiment=embodiment, timeout_s=0.7, keys=keys):
                pass

        with pytest.raises(UnavailableError):
            ask(None)
        with pytest.raises(UnavailableError):
            ask(ClientKeys.load(stranger, "robot"))
        # A client that was told another server's key does not speak to this one.
        wrong = ClientKeys.load(robot, "robot")
        other = make_keys(tmp_path / "other", "server").read_bytes().strip()
        with pytest.raises(UnavailableError):
            ask(ClientKeys(wrong.secret, wrong.public, other))
        ask(ClientKeys.load(robot, "robot"))
        # What is forgotten while the server runs opens nothing any more.
        forget_client(server_folder, "robot")
        with pytest.raises(UnavailableError):
            ask(ClientKeys.load(robot, "robot"))
        assert server.status().answered == 0


def test_keys_are_a_leave_to_listen_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    require_local("tcp://0.0.0.0:5555", allow_remote=False, encrypted=True)
    assert not caplog.records
    with pytest.raises(ConfigError, match="keys") as caught:
        require_local("tcp://0.0.0.0:5555", allow_remote=False)
    assert "simplevla keys" in caught.value.remedy


def test_damaged_exposed_and_missing_keys_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    server, robot = folders
    with pytest.raises(ConfigError, match="already"):
        make_keys(server, "server")
    (server / "server.secret").chmod(0o644)
    with pytest.raises(ConfigError, match="others can read"):
        ServerKeys.load(server)
    with pytest.raises(ConfigError, match="no secret key"):
        ServerKeys.load(tmp_path)
    (robot / "robot.secret").write_text("short")
    (robot / "robot.secret").chmod(0o600)
    with pytest.raises(ConfigError, match="holds no key"):
        ClientKeys.load(robot, "robot")
    with pytest.raises(ConfigError, match="holds no key"):
        allow_client(server, _written(tmp_path / "odd.public", "40 characters, but not the right ones..."))
    other = make_keys(tmp_path / "other", "robot")
    with pytest.raises(ConfigError, match="another key"):
        allow_client(server, other)
    for name in ("../server", "a/b", "", ".hidden", "x" * 65):
        with pytest.raises(ConfigError, match="cannot name"):
            make_keys(tmp_path, name)
    with pytest.raises(ConfigError, match="not one of"):
        forget_client(server, "nobody")


def test_the_only_client_of_a_folder_is_found(folders: tuple[Path, Path]) -> None:
    _, robot = folders
    assert ClientKeys.find(robot).public == ClientKeys.load(robot, "robot").public
    make_keys(robot, "second")
    with pytest.raises(ConfigError, match="2 clients"):
        ClientKeys.find(robot)


def test_a_robot_finds_its_keys_by_the_environment(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, robot = folders
    assert keys_for("tcp://gpu-server:5555") is None
    monkeypatch.setenv("SIMPLEVLA_KEYS", str(robot))
    found = keys_for("tcp://gpu-server:5555")
    assert found is not None
    assert found.public == ClientKeys.load(robot, "robot").public
    assert keys_for("tcp://127.0.0.1:5555") is None
    assert keys_for("ipc:///run/policy") is None


def test_keys_are_made_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        assert main(["keys", "--folder", str(tmp_path / "keys"), *words]) == 0
        return capsys.readouterr().out

    run("new", "server")
    run("new", "robot")
    run("allow", str(tmp_path / "keys/robot.public"))
    assert run("list") == "robot\n"
    run("forget", "robot")
    assert run("list") == ""
    assert main(["keys", "--folder", str(tmp_path / "keys"), "new", "server"]) == 2
    secret = (tmp_path / "keys/server.secret").read_text().strip()
    captured = capsys.readouterr()
    assert secret not in captured.out + captured.err


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
