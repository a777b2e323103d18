"""Requests of several clients computed together: who goes first, with whom, and that everybody gets their own answer in time."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from serving_fakes import ArithmeticPolicy, assert_same, instructed, observation, running
from waiting import until

from gr00t_fast import load_policy
from gr00t_fast.base.errors import Gr00tFastError, ObservationError, ServerError
from gr00t_fast.serving.client import PolicyClient
from gr00t_fast.serving.server import PolicyServer
from gr00t_fast.serving.service import BatchTimes, Queue, Request, Service
from gr00t_fast.serving.wire import encode
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

GPU, CPU = {1: 0.10, 2: 0.11, 4: 0.13, 8: 0.20}, {1: 0.10, 2: 0.19, 4: 0.37, 8: 0.70}  # seconds of a batch


def request(client: str, arrived_s: float = 0.0, deadline_s: float | None = None, size: tuple[int, int] = (32, 40), **options: Any) -> Request:
    return Request(observation(size=size), options, Future(), client, arrived_s, arrived_s, deadline_s, 0)


def queue_of(times: dict[int, float], *requests: Request) -> Queue:
    queue = Queue(BatchTimes())
    queue.times.seconds.update(times)
    queue.waiting.update({each.client: each for each in requests})
    return queue


def names(requests: list[Request]) -> str:
    return "".join(each.client for each in requests)


@pytest.mark.parametrize(
    ("times", "deadlines_s", "taken"),
    [
        pytest.param(GPU, [None] * 5, "abcd", id="a GPU takes four for one"),
        pytest.param(CPU, [None] * 5, "a", id="without deadlines a CPU goes on one by one: the mean would wait longer"),
        pytest.param(CPU, [0.5] * 5, "abcd", id="with deadlines as many as are still in time"),
        pytest.param(CPU, [0.3] * 5, "ab", id="and no more"),
        pytest.param(CPU, [0.15] * 5, "a", id="or alone"),
        pytest.param(CPU, [0.05] * 8, "abcdefgh", id="too late for all: as many as possible in the time"),
        pytest.param(CPU, [0.05, 0.3, 0.3, 0.3], "ab", id="too late for the first: the others are still in time"),
        pytest.param(GPU, [0.9, 0.8, 0.7, None, 0.6], "ecba", id="the earliest deadline first, not the first come"),
        pytest.param({}, [None] * 5, "a", id="nothing is known yet"),
        pytest.param({1: 0.1, 2: 0.3}, [5.0] * 2, "a", id="a batch that takes longer than its parts"),
    ],
)
def test_who_is_computed_next_and_with_whom(times: dict[int, float], deadlines_s: list[float | None], taken: str) -> None:
    requests = [request("abcdefgh"[number], deadline_s=deadline_s) for number, deadline_s in enumerate(deadlines_s)]
    queue = queue_of(times, *requests)
    assert names(queue.take(0.0)) == taken
    assert len(queue.waiting) == len(requests) - len(taken)


@pytest.mark.parametrize(
    ("first", "second", "equal", "any_prompts"),
    [
        ("pick", "pick", "ab", "ab"),
        ("pick", ["pick"], "ab", "ab"),
        ("pick", np.array(["pick"]), "ab", "ab"),
        ("pick", "put it there", "a", "ab"),
        (["pick"], ["put it there"], "a", "ab"),
        ("pick", ["pick", "pick"], "a", "ab"),
        ("pick", b"pick", "a", "ab"),
        ("pick", np.zeros((6,) * 8, np.uint8), "a", "a"),  # no instruction: the policy refuses it, and nobody waits for its text
    ],
)
def test_where_prompts_must_be_equal_requests_with_one_instruction_alone_go_together(first: Any, second: Any, equal: str, any_prompts: str) -> None:
    """By whatever key the policy reads it."""
    for equal_prompts, taken in ((True, equal), (False, any_prompts)):
        queue = Queue(BatchTimes(), equal_prompts)
        queue.times.seconds.update(GPU)
        queue.waiting.update(
            {name: dataclasses.replace(request(name), observation={"language.goal": said}) for name, said in zip("ab", (first, second), strict=True)}
        )
        assert names(queue.take(0.0)) == taken


def test_a_size_is_measured_as_far_as_that_is_quick_and_refined_by_what_is_served() -> None:
    times = BatchTimes()
    times.measure(lambda size: time.sleep(0.01 * size), most=4)
    assert list(times.seconds) == [1, 2, 4]
    assert times.seconds[4] > times.seconds[1] >= 0.01
    times.refine(4, times.seconds[4] + 1.0)
    assert 0.1 < times.seconds[4] < 0.5
    slow = BatchTimes()
    slow.seconds[1] = 3.0

    def failing(size: int) -> None:
        if size == 2:
            raise RuntimeError("out of memory")

    slow.measure(failing, most=8)
    assert list(slow.seconds) == [1]


class Together(ArithmeticPolicy):
    """Eight calls in the time of one. The instruction `poison` spoils a whole batch."""

    max_batch = 8

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def get_actions(self, calls: Any) -> list[Any]:
        self.sizes.append(len(calls))
        if any("poison" in str(call["observation"]["annotation.human.task_description"]) for call in calls):
            raise ZeroDivisionError("a bug")
        answers: list[Any] = []
        for call in calls:
            try:
                answers.append(self.get_action(**call))
            except Gr00tFastError as error:
                answers.append(error)
        return answers


@pytest.fixture
def together() -> Iterator[tuple[PolicyServer, Together]]:
    policy = Together()
    with running(PolicyServer(policy, port=0)) as server:
        server.service.times.seconds.update({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.1})
        yield server, policy


def asked_at_once(server: PolicyServer, policy: Together, observations: list[dict[str, Any]], **options: Any) -> list[Any]:
    """What a client each gets; all wait while one client more, the first, is served."""
    answers: list[Any] = [None] * len(observations)

    def ask(number: int) -> None:
        with PolicyClient(port=server.port) as client:
            try:
                answers[number] = client.get_action(observations[number], **options)
            except Gr00tFastError as error:
                answers[number] = error

    policy.released.clear()
    with PolicyClient(port=server.port, timeout_s=60) as first:
        holder = threading.Thread(target=lambda: first.get_action(instructed("hold")))
        holder.start()
        until(lambda: policy.busy.locked())
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(observations))]
        for thread in threads:
            thread.start()
        until(lambda: len(server.service.queue.waiting) == len(observations))
        policy.released.set()
        for thread in (holder, *threads):
            thread.join(30)
            assert not thread.is_alive()
    return answers


def test_clients_are_computed_together_and_each_gets_its_own_answer(together: tuple[PolicyServer, Together]) -> None:
    server, policy = together
    observations = [observation(**{"state.gripper": np.full((1, 1), float(number))}) for number in range(8)]
    for found, seen in zip(asked_at_once(server, policy, observations, deadline_s=30.0), observations, strict=True):
        assert_same(found, ArithmeticPolicy().get_action(seen))
    assert policy.sizes == [8]
    status = server.service.status()
    assert (status["served"], status["deadlines_missed"], status["batches"]) == (9, 0, 2)  # the first client is a batch of its own
    assert b'gr00t_batch_size_bucket{le="4.0"} 1.0' in server.service.figures.exposition()


@pytest.mark.parametrize("words", ["bug", "poison", 3])
def test_who_asks_wrongly_fails_alone(together: tuple[PolicyServer, Together], words: Any) -> None:
    """A bug in one of a batch, one that spoils a batch and is answered alone, and an instruction that is none."""
    server, policy = together
    bad = observation(**{"annotation.human.task_description": [words]})
    good = [observation(**{"state.gripper": np.full((1, 1), float(number))}) for number in range(3)]
    *found, failed = asked_at_once(server, policy, [*good, bad])
    if words == "poison":
        assert_same(failed, ArithmeticPolicy().get_action(bad))
    else:
        assert isinstance(failed, ServerError)
    for answer, seen in zip(found, good, strict=True):
        assert_same(answer, ArithmeticPolicy().get_action(seen))


def test_who_goes_while_a_batch_is_computed_takes_nobody_along(together: tuple[PolicyServer, Together]) -> None:
    server, _ = together
    with PolicyClient(port=server.port, timeout_s=0.2) as gone, contextlib.suppress(ServerError):
        gone.get_action(instructed("wait 1"))
    with PolicyClient(port=server.port) as client:
        assert_same(client.get_action(observation()), ArithmeticPolicy().get_action(observation()))


def hostile(kind: str, port: int, stop: threading.Event) -> None:
    """Asks wrongly, again and again."""
    wait = {"annotation.human.task_description": ["wait 0.1"]}
    wrong = {
        "past": ({}, {"deadline_s": -5.0}),
        "hurry": (wait, {"deadline_s": 1e-3}),
        "shapes": (wait, {}),
        "NaN": ({"state.gripper": np.full((1, 1), np.nan)}, {}),
    }
    if kind == "flood":
        message = encode({"endpoint": "get_action", "data": observation(**wait)})
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"tcp://127.0.0.1:{port}")
            while not stop.wait(0.005):
                socket.send_multipart([b"", message])
        return
    changes, options = wrong[kind]
    with PolicyClient(port=port, timeout_s=20) as client:
        for number in itertools.count():
            if stop.is_set():
                return
            size = (32 + number % 7, 40) if kind == "shapes" else (32, 40)
            with contextlib.suppress(Gr00tFastError):
                if kind == "past":  # our client sends none
                    client._call("get_action_with_options", {"observation": observation(), **options})
                client.get_action(observation(size=size, **changes), **({} if kind == "past" else options))


@pytest.mark.parametrize("kind", ["past", "hurry", "flood", "shapes", "NaN"])
def test_a_client_that_asks_wrongly_costs_the_others_no_more_than_what_is_computed(together: tuple[PolicyServer, Together], kind: str) -> None:
    """An honest client's inference takes 0.1 s, and it waits for one of the other's at most."""
    server, _ = together
    server.service.times.seconds.clear()  # this policy's batches take as long as their parts
    stop = threading.Event()
    other = threading.Thread(target=hostile, args=(kind, server.port, stop))
    other.start()
    with PolicyClient(port=server.port) as client:
        times_s = []
        for _ in range(12):
            began_s = time.monotonic()
            client.get_action(instructed("wait 0.1"))
            times_s.append(time.monotonic() - began_s)
    stop.set()
    other.join(30)
    assert sorted(times_s)[-2] < 0.3, "three times an idle server's"


def test_deadlines_that_are_missed_are_counted_for_their_client(together: tuple[PolicyServer, Together]) -> None:
    server, _ = together
    with PolicyClient(port=server.port) as client:
        client.get_action(instructed("wait 0.1"), deadline_s=-3.0)  # of an arm that has nothing left to play
        client.get_action(observation(), deadline_s=60.0)
        status = client.get_status()
    assert (status["served"], status["deadlines_missed"]) == (2, 1)
    assert b'gr00t_deadlines_missed_total{client="127.0.0.1#' in server.service.figures.exposition()


@pytest.mark.parametrize(
    ("network", "engine", "batches"),
    [("n1.5", "eager", 1), ("n1.6", "eager", 1), ("n1.7", "eager", 1), pytest.param("n1.5", "fused", 3, id="fused: equal prompts alone together")],
)
def test_a_network_answers_several_clients_as_it_answers_each_alone(network: Any, engine: str, batches: int, tmp_path: Path) -> None:
    """The real one, by its own table of times; noise and instructions of each client's own."""
    path = write_random_checkpoint(tmp_path, "tiny", "so100", network=network)
    policy = load_policy(path, device="cpu", precision="fp32", engine=engine, seed=0)
    generator = np.random.default_rng(0)
    calls = [
        {"observation": policy.example_observation(words), "noise": generator.standard_normal((1, *policy.chunk_shape), np.float32)}
        for words in ("pick", "pick", "put it there", "wave")
    ]
    alone = [policy.get_action(**call) for call in calls]
    service = Service(policy, None, 10**9)
    service.measure_batches()
    assert set(service.times.seconds) == {1, 2, 4, 8}
    service.times.seconds.update({2: 1e-6, 4: 1e-6})  # whatever this machine takes
    answers = [service.ask(call["observation"], number, noise=call["noise"]) for number, call in enumerate(calls)]
    answers[-1].add_done_callback(lambda _: service.stop())
    service.run()
    assert service.status()["batches"] == batches
    for answer, expected in zip(answers, alone, strict=True):
        for key, rows in answer.result().items():
            np.testing.assert_allclose(rows, expected[key], rtol=0, atol=1e-3)
    with pytest.raises(ObservationError, match="a batch of 9"):
        service.ask(observation(9), "a")
