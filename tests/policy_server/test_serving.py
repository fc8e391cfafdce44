"""How a server treats many clients: turns, deadlines, batches, the end, and what it tells of itself."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from policy_server import messages, protocol
from policy_server.client import PolicyClient, RemoteError
from policy_server.jpeg import decode_jpeg, encode_jpeg
from policy_server.metrics import Metrics, MetricsPage
from policy_server.schedule import DeadlineError
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.bundle import Bundle
from simplevla.embodiment import Embodiment
from simplevla.errors import ObservationError, UnavailableError
from simplevla.observation import Observation

pytestmark = pytest.mark.by_the_clock

Observe = Callable[..., Observation]
Serving = Callable[..., AbstractContextManager[PolicyServer]]
SCREEN = {"head": (64, 48)}


@contextmanager
def talking(server: PolicyServer, embodiment: Embodiment) -> Iterator[zmq.Socket[bytes]]:
    """Yield a socket that has said hello."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        raw = context.socket(zmq.DEALER)
        raw.connect(server.address)
        raw.send_multipart(messages.encode(protocol.Hello(request=0, embodiment=embodiment)))
        assert isinstance(hear(raw), protocol.Welcome)
        yield raw
    finally:
        context.destroy(linger=0)


def hear(raw: zmq.Socket[bytes]) -> protocol.Header:
    assert raw.poll(10_000), "no answer"
    return messages.decode(raw.recv_multipart()).header


def say(raw: zmq.Socket[bytes], request: int, observation: Observation, deadline_ns: int = 0) -> None:
    raw.send_multipart(messages.encode_observation(request, observation, ["head"], deadline_ns=deadline_ns))


def wait_for(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_s, "it never happened"
        time.sleep(0.005)


def test_the_latest_request_wins_while_another_is_computed(
    server: PolicyServer, session: Any, embodiment: Embodiment, observe: Observe
) -> None:
    with talking(server, embodiment) as raw:
        session.batches.clear()
        session.pause.clear()
        say(raw, 1, observe(1))
        wait_for(lambda: session.batches == [1])
        for request in (2, 3, 4):
            say(raw, request, observe(request))
        # Refused at once: nothing is computed meanwhile, and the server still says how it is.
        for request in (2, 3):
            refusal = hear(raw)
            assert isinstance(refusal, protocol.Error)
            assert (refusal.request, refusal.code) == (request, "superseded")
        raw.send_multipart(messages.encode(protocol.Health(request=9)))
        status = hear(raw)
        assert isinstance(status, protocol.Status)
        assert (status.waiting, status.state, status.clients) == (1, "ready", 1)
        session.pause.set()
        assert [hear(raw).request for _ in range(2)] == [1, 4]
        assert session.batches == [1, 1]


def test_what_is_too_late_is_refused_with_a_reason(
    server: PolicyServer, session: Any, embodiment: Embodiment, observe: Observe
) -> None:
    with talking(server, embodiment) as raw:
        say(raw, 1, observe(), deadline_ns=time.monotonic_ns() - 1)
        refusal = hear(raw)
        assert isinstance(refusal, protocol.Error)
        assert refusal.code == "too_late"
        assert refusal.remedy
        say(raw, 2, observe(), deadline_ns=time.monotonic_ns() + 10**10)
        assert isinstance(hear(raw), protocol.Chunk)
        # One that waits behind another is refused when its time has come, not when the other is done.
        with talking(server, embodiment) as other:
            session.batches.clear()
            session.pause.clear()
            say(other, 1, observe())
            wait_for(lambda: session.batches == [1])
            say(raw, 3, observe(), deadline_ns=time.monotonic_ns() + 2 * 10**8)
            refusal = hear(raw)
            assert isinstance(refusal, protocol.Error)
            assert (refusal.request, refusal.code) == (3, "too_late")
            session.pause.set()
            assert isinstance(hear(other), protocol.Chunk)


def test_a_client_says_until_when_and_is_told_at_once(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=10) as client:
        assert client.act(observe(), deadline_s=5).chunk.length == 3
        # A second ago: how far clocks are apart is guessed from exchanges that a pause makes uneven.
        with pytest.raises(RemoteError) as caught:
            client.act(observe(), deadline_s=-1.0)
        assert caught.value.code == "too_late"
        assert client.act(observe()).chunk.length == 3


def test_several_robots_are_answered_in_one_run_each_with_its_own(
    policy: ServedPolicy, session: Any, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    session.info = dataclasses.replace(session.info, max_batch=4)
    wanted = [policy.answer(observe(seed))[0].actions for seed in range(4)]
    have: dict[int, Any] = {}

    with serving(policy) as server:
        clients = [PolicyClient(server.address, embodiment=embodiment, timeout_s=60) for _ in range(4)]
        for client in clients:
            client.connect()

        def ask(seed: int) -> None:
            have[seed] = clients[seed].act(observe(seed))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        session.batches.clear()
        session.pause.clear()
        threads[0].start()
        wait_for(lambda: session.batches == [1])
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: server.status().waiting == 3)
        session.pause.set()
        for thread in threads:
            thread.join(60)
        for client in clients:
            client.close()
    assert session.batches == [1, 3]
    for seed in range(4):
        np.testing.assert_array_equal(have[seed].chunk.actions, wanted[seed])
        assert have[seed].timing.total_ms <= have[seed].round_trip_ms


def test_one_bad_instruction_in_a_batch_spoils_no_other_answer(
    policy: ServedPolicy, observe: Observe
) -> None:
    long = dataclasses.replace(observe(1), instruction="move the can " * 20)
    answers = policy.answer_many([observe(0), long, observe(2)])
    assert isinstance(answers[1], ObservationError)
    for index in (0, 2):
        answer = answers[index]
        assert isinstance(answer, tuple)
        np.testing.assert_array_equal(answer[0].actions, policy.answer(observe(index))[0].actions)


def test_a_batch_that_fails_is_answered_one_by_one(
    policy: ServedPolicy, session: Any, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    session.info = dataclasses.replace(session.info, max_batch=2)
    with (
        serving(policy) as server,
        talking(server, embodiment) as first,
        talking(server, embodiment) as a,
        talking(server, embodiment) as b,
    ):
        session.batches.clear()
        session.pause.clear()
        say(first, 1, observe())
        wait_for(lambda: session.batches == [1])
        for raw in (a, b):
            say(raw, 1, observe())
        wait_for(lambda: server.status().waiting == 2)
        session.failure = RuntimeError("too hot")
        session.pause.set()
        assert {type(hear(raw)) for raw in (first, a, b)} == {protocol.Chunk}
    assert session.batches == [1, 1, 1]


def test_the_end_waits_for_what_is_computed_and_refuses_what_comes_then(
    policy: ServedPolicy, session: Any, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    with serving(policy) as server, talking(server, embodiment) as raw:
        session.batches.clear()
        session.pause.clear()
        say(raw, 1, observe())
        wait_for(lambda: session.batches == [1])
        server.stop()
        wait_for(lambda: server._draining)
        say(raw, 2, observe())
        refusal = hear(raw)
        assert isinstance(refusal, protocol.Error)
        assert refusal.code == "draining"
        session.pause.set()
        assert isinstance(hear(raw), protocol.Chunk)


def test_another_front_door_asks_in_turn(
    server: PolicyServer, policy: ServedPolicy, session: Any, observe: Observe
) -> None:
    chunk, timing = server.ask("elsewhere", observe(3), 5)
    np.testing.assert_array_equal(chunk.actions, policy.answer(observe(3))[0].actions)
    assert timing.inference_ms > 0
    with pytest.raises(ObservationError):
        server.ask("elsewhere", dataclasses.replace(observe(), images={}), 5)
    session.pause.clear()
    with pytest.raises((UnavailableError, DeadlineError)):  # the latter where one answer takes longer
        server.ask("elsewhere", observe(), 0.1)
    session.pause.set()


def test_committed_actions_reach_the_policy_and_come_first_in_the_answer(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=10) as client:
        first = client.act(observe(1)).chunk.actions
        asking = dataclasses.replace(observe(2), committed=first[:2].copy(), last_action=0)
        answer = client.act(asking).chunk.actions
        np.testing.assert_allclose(answer[:2], first[:2], atol=1e-6)
        nan = np.full((1, embodiment.dimension), np.nan, np.float32)
        with pytest.raises(ObservationError, match="committed"):
            client.act(dataclasses.replace(asking, committed=nan))


def test_jpeg_loses_little_and_is_refused_where_it_lies(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    y, x = np.mgrid[0:48, 0:64]
    smooth = np.stack([x * 3, y * 4, 100 + x + y], axis=-1).astype(np.uint8)
    data = encode_jpeg(smooth, 90)
    assert data.size < smooth.size / 2
    error = decode_jpeg(data, 64, 48).astype(float) - smooth
    assert np.abs(error).mean() < 3
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=10, jpeg_quality=90) as client:
        assert client.transport == "network"
        assert client.act(dataclasses.replace(observe(), images={"head": smooth})).chunk.length == 3
    for bad, says in (
        (encode_jpeg(smooth[:40], 90), "64x40"),
        (data[: len(data) // 2], "sound"),
        (np.zeros(10, np.uint8), "sound"),
    ):
        with pytest.raises(ObservationError, match=says):
            decode_jpeg(bad, 64, 48)
    with pytest.raises(ObservationError, match="quality"):
        encode_jpeg(smooth, 0)


def test_a_jpeg_is_unpacked_only_for_cameras_of_a_known_size(observe: Observe) -> None:
    message = messages.decode(messages.encode_observation(1, observe(), ["head"], jpeg_quality=90))
    assert messages.decode_observation(message, SCREEN).images["head"].shape == (48, 64, 3)
    for sizes in ({}, {"head": (64, 49)}):
        with pytest.raises(protocol.MessageError):
            messages.decode_observation(message, sizes)


def test_metrics_and_health_are_on_a_page(
    policy: ServedPolicy,
    session: Any,
    bundle: Bundle,
    embodiment: Embodiment,
    observe: Observe,
    serving: Serving,
) -> None:
    metrics = Metrics()

    def fetch(page: MetricsPage, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{page.port}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with (
        serving(policy, metrics=metrics) as server,
        MetricsPage(metrics, 0, server.health) as page,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client,
    ):
        for seed in range(3):
            client.act(observe(seed))
        session.failure = RuntimeError("boom")
        with pytest.raises(RemoteError):
            client.act(observe())
        wait_for(lambda: 'simplevla_refusals_total{code="internal"} 1.0' in fetch(page, "/metrics")[1])
        text = fetch(page, "/metrics")[1]
        assert "simplevla_answers_total 3.0" in text
        for stage in ("receive", "queue", "preprocess", "inference", "decode", "send"):
            assert f'simplevla_stage_seconds_count{{stage="{stage}"}} 3.0' in text
        assert f'simplevla_policy{{id="{bundle.id}"}} 1.0' in text
        code, health = fetch(page, "/health")
        assert code == 200
        assert json.loads(health)["answered"] == 3
        assert fetch(page, "/secret")[0] == 404
        server.stop()
        assert fetch(page, "/health")[0] == 503


def test_an_inference_that_never_ends_is_not_well(
    server: PolicyServer, session: Any, embodiment: Embodiment, observe: Observe
) -> None:
    with talking(server, embodiment) as raw:
        session.batches.clear()
        session.pause.clear()
        say(raw, 1, observe())
        wait_for(lambda: session.batches == [1])
        assert server.health()[0]
        time.sleep(0.02)
        well, says = server.health(stalled_s=0.01)
        assert not well
        assert says["busy_s"] > 0.01
        session.pause.set()
        hear(raw)


def test_who_waits_for_the_door_looks_up_now_and_then(policy: ServedPolicy) -> None:
    # So a signal is heard of that came just before the main thread began to wait.
    with PolicyServer(policy, "tcp://127.0.0.1:*") as server:
        with server._at_door:
            thread = threading.Thread(target=server.serve)
            thread.start()
            server._stop.set()
            wait_for(lambda: all(other.name != "policy-server" for other in threading.enumerate()))
        thread.join(10)
        assert not thread.is_alive()
