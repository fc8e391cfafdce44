"""The client for asyncio: the same answers, several under way at once, and no silence without a name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from policy_server.async_client import AsyncPolicyClient
from policy_server.client import RemoteError
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.embodiment import Embodiment
from simplevla.errors import ObservationError, UnavailableError
from simplevla.observation import Observation

pytestmark = pytest.mark.by_the_clock

Observe = Callable[..., Observation]
Serving = Callable[..., AbstractContextManager[PolicyServer]]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@pytest.mark.parametrize("local", [True, False])
def test_it_gets_the_answers_that_the_policy_gives(
    server: PolicyServer, policy: ServedPolicy, embodiment: Embodiment, observe: Observe, local: bool
) -> None:
    async def work() -> None:
        async with AsyncPolicyClient(
            server.address, embodiment=embodiment, timeout_s=10, local=local
        ) as client:
            assert client.info.policy_id == policy.policy_id
            for seed in range(6):
                reply = await client.act(observe(seed))
                want, _ = policy.answer(observe(seed))
                np.testing.assert_array_equal(reply.chunk.actions, want.actions)
            assert (await client.health()).answered == 6

    run(work())


@pytest.mark.parametrize("local", [True, False])
def test_of_many_questions_at_once_each_gets_one_answer(
    server: PolicyServer,
    policy: ServedPolicy,
    session: Any,
    embodiment: Embodiment,
    observe: Observe,
    local: bool,
) -> None:
    async def work() -> None:
        async with AsyncPolicyClient(
            server.address, embodiment=embodiment, timeout_s=10, local=local
        ) as client:
            session.batches.clear()
            session.pause.clear()
            tasks = [asyncio.create_task(client.act(observe(0)))]
            while session.batches != [1]:
                await asyncio.sleep(0.01)
            tasks += [asyncio.create_task(client.act(observe(seed))) for seed in (1, 2, 3)]
            while server.status().refused < 2:
                await asyncio.sleep(0.01)
            session.pause.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for seed in (0, 3):
            outcome = outcomes[seed]
            assert not isinstance(outcome, BaseException)
            want, _ = policy.answer(observe(seed))
            np.testing.assert_array_equal(outcome.chunk.actions, want.actions)
        for seed in (1, 2):
            outcome = outcomes[seed]
            assert isinstance(outcome, RemoteError)
            assert outcome.code == "superseded"

    run(work())


def test_it_waits_when_all_slots_are_taken(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    async def work() -> None:
        async with AsyncPolicyClient(server.address, embodiment=embodiment, timeout_s=20) as client:
            outcomes = await asyncio.gather(
                *(client.act(observe(seed)) for seed in range(20)), return_exceptions=True
            )
        answered = [each for each in outcomes if not isinstance(each, BaseException)]
        assert answered
        for refused in (each for each in outcomes if isinstance(each, BaseException)):
            assert isinstance(refused, RemoteError)
            assert refused.code == "superseded"

    run(work())


def test_a_cancelled_question_does_not_take_the_place_of_the_next(
    server: PolicyServer, session: Any, embodiment: Embodiment, observe: Observe
) -> None:
    async def work() -> None:
        async with AsyncPolicyClient(server.address, embodiment=embodiment, timeout_s=10) as client:
            for _ in range(6):
                session.batches.clear()
                session.pause.clear()
                task = asyncio.create_task(client.act(observe()))
                while session.batches != [1]:
                    await asyncio.sleep(0.01)
                task.cancel()
                session.pause.set()
                assert (await client.act(observe(1))).chunk.length == 3

    run(work())


def test_a_restart_is_not_noticed_and_silence_has_a_name(
    policy: ServedPolicy, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    async def work() -> None:
        with serving(policy) as server:
            address = server.address
            client = AsyncPolicyClient(address, embodiment=embodiment, timeout_s=1.0)
            before = (await client.act(observe())).chunk.actions
        with serving(policy, address):
            np.testing.assert_array_equal((await client.act(observe())).chunk.actions, before)
        start_s = time.monotonic()
        with pytest.raises(UnavailableError, match="no policy server answers"):
            await client.act(observe())
        assert time.monotonic() - start_s < 5
        client.close()

    run(work())


def test_a_bad_observation_is_named_before_anything_is_sent(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    async def work() -> None:
        async with AsyncPolicyClient(server.address, embodiment=embodiment, timeout_s=10) as client:
            with pytest.raises(ObservationError):
                await client.act(Observation({}, observe().state, "go", 0))
            assert server.status().refused == 0

    run(work())
