"""A policy server that is killed, stopped, hangs, stays away or comes back as another one, under a control loop that runs.

The loops run on fake arms in real time, the servers in processes of their own; scenarios that only need time to pass run side by side.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest
import zmq
from control_fakes import FakeRobot
from serving_fakes import ArithmeticPolicy, ServerProcess, observation, running
from waiting import until

from gr00t_fast.base.clock import MonotonicClock
from gr00t_fast.base.errors import ServerError, ServerUnreachableError
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.cli import run as cli
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.record.report import build_report, sections, text_of
from gr00t_fast.record.session import Session
from gr00t_fast.serving import PolicyClient, PolicyServer
from gr00t_fast.serving.remote import RemotePolicy

FPS = 30.0
HORIZON = 16
PARSING = threading.Lock()  # draccus compiles source text, which Python 3.11 cannot do in two threads at once


def address_of(server: Any) -> str:
    return f"tcp://127.0.0.1:{server.port}"


class Run:
    """A control loop in this process on a fake arm in real time, around a policy on a server."""

    def __init__(self, server: Any, *flags: str, timeout_s: float | None, episodes: int = 1) -> None:
        self.said: list[str] = []
        with PARSING:
            config = cli.parse(["--robot.type=so100_sim", "--lang_instruction=go", f"--server={address_of(server)}", *flags])
        self.policy = RemotePolicy(config.server, config.api_token, config.server_timeout_s, config.server_reconnect_s, echo=self.said.append)
        clock, known = MonotonicClock(), self.policy.metadata
        self.robot, self.landed_s, self.error = FakeRobot(clock), 0.0, None
        self.times_s: dict[str, float] = {}  # when what was done to the server
        land = self.robot.land
        self.robot.land = lambda *_: setattr(self, "landed_s", time.monotonic()) or land()
        served, joints = self.policy.get_modality_config(), self.robot.joint_names
        binding = RobotBinding(served, known.state_widths, known.action_widths, joints, {"front": "webcam"})
        planner = cli.build_planner(config, self.policy, binding, clock, FPS, cli.voice(config))
        self.stop = StopSignals()
        self.loop = ControlLoop(
            self.robot, planner, LoopOptions(FPS, episodes, timeout_s), clock, self.stop, Session(self.stop), echo=lambda line: None
        )

    def play(self, *acts: tuple[float, Callable[[], Any]]) -> Run:
        """The run, with `error` for what ended it; each of `acts` is done so many seconds after the first target went out."""
        timers = [threading.Timer(at_s, act) for at_s, act in acts]

        def start_timers() -> None:
            self.robot.on_send = lambda: None
            for timer in timers:
                timer.start()

        self.robot.on_send = start_timers
        try:
            with self.stop:
                self.loop.run()
        except ServerError as error:
            self.error = error
        finally:
            for timer in timers:
                timer.cancel()
                if timer.ident is not None:
                    timer.join(10)
            self.policy.close()
        return self

    def ends_when_back(self) -> Run:
        """Soon after the server answers again, however long it takes to start."""
        sent: list[int] = []

        def look() -> None:
            sent.extend([len(self.robot.sent)] if any("is back after" in line for line in self.said) else [])
            self.loop.session.over = bool(sent) and len(self.robot.sent) > sent[0] + 20 and not self.underrun[-4:].all()  # this tick has yet to come

        self.robot.on_observe = look
        return self

    @property
    def underrun(self) -> np.ndarray:
        return self.loop.trace.arrays()["underrun"]

    def observed_s(self) -> np.ndarray:
        """When the robot saw what each target comes from."""
        return np.array([time_s for time_s, _ in self.robot.sent]) - self.loop.trace.arrays()["age_ticks"] / FPS


# --- scenarios that run side by side -----------------------------------------------------------------------------------------------------


class Server:
    """A server's process that is killed and started again, which a run notes."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self.process = stack, stack.enter_context(ServerProcess())

    def run(self, *flags: str, **options: Any) -> Run:
        self.latest = Run(self.process, *flags, **options)
        return self.latest

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.latest.times_s["killed"] = time.monotonic()

    def restart(self, fps: float = 30.0) -> None:
        self.latest.times_s["back"] = time.monotonic()  # not before that
        self._stack.enter_context(ServerProcess(port=self.process.port, fps=fps))


class Proxy:
    """A ZeroMQ proxy in a thread, in front of one server or of several in turn. Its clients keep their connection when a server goes."""

    def __init__(self, *servers: Any) -> None:
        self._context = zmq.Context()
        self._front, self._back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        self.port = self._front.bind_to_random_port("tcp://127.0.0.1")
        for server in servers:
            self._back.connect(address_of(server))
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def _pass_on(self) -> None:
        with contextlib.suppress(zmq.ContextTerminated):
            zmq.proxy(self._front, self._back)
        self._front.close(0)
        self._back.close(0)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.term()
        self._thread.join(10)


def restarted(server: Server, flags: tuple[str, ...]) -> Run:
    return server.run(*flags, timeout_s=120.0).ends_when_back().play((0.4, server.kill), (2.2, server.restart))


def for_good(server: Server, flags: tuple[str, ...]) -> Run:
    return server.run(*flags, "--server_reconnect_s=1.2", timeout_s=60.0).play((0.4, server.kill))


def hanging(server: Server, flags: tuple[str, ...]) -> Run:
    stop, go_on = (partial(server.process.process.send_signal, number) for number in (signal.SIGSTOP, signal.SIGCONT))
    return server.run(*flags, "--server_timeout_s=4", timeout_s=120.0).ends_when_back().play((0.4, stop), (8.0, go_on))


def never_there(server: Server, flags: tuple[str, ...]) -> Run:
    run = server.run(*flags, "--server_timeout_s=5", "--server_reconnect_s=1", timeout_s=60.0)
    server.kill()
    return run.play()


def another_behind_a_proxy(server: Server, flags: tuple[str, ...]) -> Run:
    """Asked of the same connection after the outage. The other policy differs in the rate of its data."""
    with Proxy(server.process) as proxy:
        server.latest = Run(proxy, *flags, timeout_s=60.0)
        return server.latest.play((0.4, server.kill), (1.0, partial(server.restart, fps=15.0)))


SYNC, MOVING = ("--controller=sync", "--action_horizon=8"), ("--controller=threaded",)
CONTROLLERS = (SYNC, MOVING, (*MOVING, "--smoothing=prefix"))
SCENARIOS = [(another_behind_a_proxy, ())]
SCENARIOS += [(restarted, flags) for flags in CONTROLLERS] + [(hanging, MOVING)]
SCENARIOS += [(scenario, flags) for scenario in (for_good, never_there) for flags in (SYNC, MOVING)]


def play(scenario: Callable[[Server, tuple[str, ...]], Run], flags: tuple[str, ...]) -> Run:
    with contextlib.ExitStack() as stack:
        return scenario(Server(stack), flags)


@pytest.fixture(scope="module")
def scenarios() -> dict[Any, Future]:
    """What came of each."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        futures = {each: pool.submit(play, *each) for each in SCENARIOS}
        wait(futures.values())
    return futures


@pytest.mark.parametrize("flags", CONTROLLERS, ids=" ".join)
def test_the_arm_holds_while_its_server_is_killed_and_goes_on_when_it_is_back(scenarios: dict[Any, Future], flags: tuple[str, ...]) -> None:
    run: Run = scenarios[restarted, flags].result()
    underrun, killed_s, back_s = run.underrun, run.times_s["killed"], run.times_s["back"]
    sent = np.array([targets for _, targets in run.robot.sent])
    at_s = np.array([time_s for time_s, _ in run.robot.sent])
    away = (at_s > killed_s) & (at_s < back_s)
    assert (away & underrun).any()
    held = away & (np.arange(len(at_s)) >= np.flatnonzero(away & underrun)[0])  # from when the rest of the chunk has played
    assert underrun[held].all()
    assert np.ptp(sent[held], axis=0).max() == 0, "the arm moved without a server"
    assert not underrun[-5:].all(), "the run did not go on"
    assert (sent[-1] != sent[held][-1]).any(), "the arm does not move although the server is back"
    played = ~underrun & (at_s > back_s)
    assert run.observed_s()[played].min() > killed_s, "what was inferred from before the outage played after it"
    summary = run.loop.planner.summary()
    assert summary["lost_inferences"] >= 1
    assert summary["server"]["outages"] == 1
    assert 1.0 < summary["server"]["away_s"] < 60
    assert sum("The arm holds its pose" in line for line in run.said) == 1
    assert sum("is back after" in line for line in run.said) == 1
    assert (run.error, run.loop.trace.ended_by, run.loop.trace.landing.safe) == (None, "done", True)
    text = text_of(sections(build_report(run.loop, {})))
    assert f"{run.policy.address}, outages 1, " in text
    assert max(map(len, text.splitlines())) < 130


@pytest.mark.parametrize("flags", [SYNC, MOVING], ids=" ".join)
def test_a_server_that_stays_away_ends_the_run_with_the_arm_landed(scenarios: dict[Any, Future], flags: tuple[str, ...]) -> None:
    run: Run = scenarios[for_good, flags].result()
    assert "has been away for" in str(run.error)
    assert "--server_reconnect_s=1.2 allows no more" in str(run.error)
    assert not isinstance(run.error, ServerUnreachableError)
    assert 1.1 < run.landed_s - run.times_s["killed"] < 60
    assert (run.loop.trace.ended_by, run.loop.trace.landing.safe) == ("error", True)


def test_another_policy_behind_a_proxy_ends_the_run_before_it_moves_the_arm(scenarios: dict[Any, Future]) -> None:
    run: Run = scenarios[another_behind_a_proxy, ()].result()
    assert "another policy" in str(run.error)
    assert (run.loop.trace.ended_by, run.loop.trace.landing.safe) == ("error", True)
    played = ~run.underrun
    assert run.observed_s()[played].max() < run.times_s["back"], "what the other policy answered has moved the arm"


def test_a_server_that_hangs_for_a_while(scenarios: dict[Any, Future]) -> None:
    """SIGSTOP: the connection stays, nobody answers. The late answer is not taken for a later observation's."""
    run: Run = scenarios[hanging, MOVING].result()
    assert run.underrun.sum() > 5
    assert not run.underrun[-5:].all()
    assert run.loop.trace.arrays()["age_ticks"][~run.underrun].max() < HORIZON
    assert run.loop.planner.summary()["server"]["outages"] == 1
    assert run.loop.trace.ended_by == "done"


@pytest.mark.parametrize("flags", [SYNC, MOVING], ids=" ".join)
def test_a_server_that_stays_away_at_the_first_plan_is_an_error_and_nothing_moves(scenarios: dict[Any, Future], flags: tuple[str, ...]) -> None:
    run: Run = scenarios[never_there, flags].result()
    assert "has been away for" in str(run.error)
    assert run.policy.address in str(run.error)
    assert (run.robot.sent, run.robot.calls[-1], len(run.said)) == ([], "land", 1)


# --- one at a time -----------------------------------------------------------------------------------------------------------------------


class Refuses(ArithmeticPolicy):
    code = ""

    def get_action(self, *args: Any, **options: Any) -> dict[str, np.ndarray]:
        if self.calls:
            raise ServerError("not now", self.code)
        return super().get_action(*args, **options)


@pytest.mark.parametrize(("code", "passes"), [(ServerError.STOPPING, True), (ServerError.BUSY, True), ("", False)])
def test_refusals_that_pass_and_one_that_does_not(code: str, passes: bool) -> None:
    """The first: Ctrl-C at the server."""
    policy = Refuses()
    policy.code = code
    with running(PolicyServer(policy, port=0)) as server, closing(RemotePolicy(address_of(server), None, 5.0, 30.0)) as remote:
        remote.get_action(observation())
        with pytest.raises(ServerError, match="not now") as caught:
            remote.get_action(observation())
        assert isinstance(caught.value, ServerUnreachableError) is passes


@pytest.mark.parametrize("flags", [SYNC, MOVING], ids=" ".join)
def test_ctrl_c_lands_at_once_while_the_server_hangs(flags: tuple[str, ...]) -> None:
    with ServerProcess() as server:
        run = Run(server, *flags, "--server_timeout_s=60", "--server_reconnect_s=60", timeout_s=None)
        run.play((0.3, lambda: server.process.send_signal(signal.SIGSTOP)), (0.9, partial(press_ctrl_c, run)))
    assert run.landed_s - run.times_s["pressed"] < 30  # the client would wait for a minute
    assert (run.loop.trace.ended_by, run.loop.trace.landing.safe) == ("SIGINT", True)


@pytest.mark.parametrize("flags", [SYNC, MOVING], ids=" ".join)
def test_ctrl_c_is_obeyed_while_an_episode_waits_for_its_server(flags: tuple[str, ...]) -> None:
    with ServerProcess() as server:
        run = Run(server, *flags, "--server_timeout_s=5", "--server_reconnect_s=60", timeout_s=None)
        server.kill()
        timer = threading.Timer(0.7, press_ctrl_c, (run,))
        timer.start()
        run.play()
        timer.join(10)
    assert run.landed_s - run.times_s["pressed"] < 30
    assert (run.loop.trace.ended_by, run.robot.sent) == ("SIGINT", [])


def press_ctrl_c(run: Run) -> None:
    until(lambda: signal.getsignal(signal.SIGINT) is not signal.default_int_handler)  # outside of a run it would end the tests
    run.times_s["pressed"] = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)


def test_a_client_that_is_closed_beside_a_call_is_left_to_that_call() -> None:
    """A run that ends does so. A socket of ZeroMQ that two threads use crashes the process, about once in a thousand times."""
    client = PolicyClient(port=1, timeout_s=60.0)  # nobody is there
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get_modality_config)
        until(client._in_use.locked)
        client.close()
        with pytest.raises(ServerError, match="closed"):
            waiting.result(30)
    assert client._context.closed


def test_a_restart_between_two_calls_is_noticed_by_the_next_one() -> None:
    """It fails, because the answer might come late; so does the one that waited for the server. The one after them checks who answers."""
    with ServerProcess() as first, closing(RemotePolicy(address_of(first), None, 5.0, 30.0)) as remote:
        remote.get_action(observation())
        first.kill()
        with ServerProcess(port=first.port) as second:
            for reason in ("broke", "answers again"):
                with pytest.raises(ServerUnreachableError, match=reason):
                    remote.get_action(observation())
            remote.get_action(observation())
            assert remote.summary()["server"]["outages"] == 1
            second.kill()
        with ServerProcess(port=first.port, fps=15.0):
            for reason in ("broke", "answers again", "came back with another policy"):
                with pytest.raises(ServerError, match=reason):
                    remote.get_action(observation())


def test_another_policy_behind_a_proxy_is_noticed_after_a_time_out() -> None:
    """It is asked what it serves before it is asked for actions: NVIDIA's servers have no fingerprint."""
    with ServerProcess() as first, Proxy(first) as proxy, closing(RemotePolicy(address_of(proxy), None, 1.0, 60.0)) as remote:
        remote.get_action(observation())
        first.kill()
        with pytest.raises(ServerUnreachableError, match="no answer"):
            remote.get_action(observation())
        with ServerProcess(port=first.port, fps=15.0):
            remote.reset()  # waits for it
            with pytest.raises(ServerError, match="came back with another policy"):
                remote.get_action(observation())
        assert remote.summary()["server"]["reconnects"] == 0


def test_servers_with_different_policies_behind_one_address_are_told_apart() -> None:
    """Without an outage, and where only the weights differ."""
    first, second = ArithmeticPolicy(), ArithmeticPolicy()
    first.fingerprint, second.fingerprint = lambda: "weights of one", lambda: "weights of another"
    with running(PolicyServer(first, port=0)) as one, running(PolicyServer(second, port=0)) as other:
        with Proxy(one, one) as proxy, closing(RemotePolicy(address_of(proxy), None, 5.0, 30.0)) as remote:
            for _ in range(3):
                remote.get_action(observation())
        with Proxy(one, other) as proxy, closing(RemotePolicy(address_of(proxy), None, 5.0, 30.0)) as remote:
            caught = [_error_of(remote) for _ in range(4)]
    assert caught[0::2] != caught[1::2]
    assert {"answered with another policy" in error for error in caught if error} == {True}


def _error_of(remote: RemotePolicy) -> str:
    try:
        remote.get_action(observation())
    except ServerError as error:
        return str(error)
    return ""


def test_an_episode_waits_for_a_server_that_goes_at_its_beginning() -> None:
    said: list[str] = []
    with ServerProcess() as first, closing(RemotePolicy(address_of(first), None, 5.0, 60.0, echo=said.append)) as remote:
        remote.get_action(observation())
        remote.reset()
        first.kill()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(remote.get_action, observation())
            time.sleep(1.0)
            assert not waiting.done()
            with ServerProcess(port=first.port):
                assert waiting.result(60).keys() == {"action.single_arm", "action.gripper"}
    assert [line.split()[0] for line in said] == ["WARNING:", "The"]
    assert remote.summary()["server"]["outages"] == 1
