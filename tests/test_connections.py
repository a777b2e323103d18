"""Who keeps a place and memory on a policy server when both are short."""

from __future__ import annotations

import time

from gr00t_fast.serving.connections import Connection, Connections, Throttle

LONG_AGO_S = -1000.0


def connection(closed: list[str], name: str, host: str = "a", **fields: object) -> Connection:
    return Connection(host, lambda: closed.append(name), **{"since_s": time.monotonic() + LONG_AGO_S, **fields})


def test_the_place_of_a_connection_that_was_never_served_goes_to_a_newcomer() -> None:
    closed: list[str] = []
    connections = Connections(max_connections=3)
    for one in (connection(closed, "served", served=True), connection(closed, "silent"), connection(closed, "waits for its answer", waiting=1)):
        connections.enter(one)
    connections.enter(newcomer := connection(closed, "newcomer"))
    assert closed == ["silent"]
    assert newcomer in connections


def test_the_host_with_most_connections_loses_one() -> None:
    closed: list[str] = []
    connections = Connections(max_connections=4)
    for name, host in (("first of b", "b"), ("first of a", "a"), ("second of a", "a"), ("third of a", "a")):
        connections.enter(connection(closed, name, host))
    connections.enter(connection(closed, "newcomer", "c"))
    assert len(closed) == 1
    assert closed[0].endswith("of a")


def test_newcomers_of_the_same_moment_are_heard_first() -> None:
    closed: list[str] = []
    connections = Connections(max_connections=2)
    served = connection(closed, "served", served=True)
    connections.enter(served)
    for number in range(4):
        connections.enter(connection(closed, str(number), since_s=time.monotonic() + 1000))
    assert closed == []
    for number in range(4, 100):
        connections.enter(connection(closed, str(number), since_s=time.monotonic() + 1000))
    assert served in connections
    assert len(closed) >= 90


def test_a_large_message_waits_for_the_oldest_and_small_ones_do_not() -> None:
    closed: list[str] = []
    went_on: list[str] = []
    connections = Connections(unfinished_limit_bytes=100)
    oldest, large, small = (connection(closed, name) for name in ("oldest", "large", "small"))
    for one, size_bytes in ((oldest, 60), (large, 60), (small, 10)):
        connections.enter(one)
        connections.holds(one, size_bytes)
    assert connections.may_go_on(oldest, lambda: None)
    assert not connections.may_go_on(large, lambda: went_on.append("large"))
    assert connections.may_go_on(small, lambda: None)
    assert connections.crowded
    connections.holds(oldest, 0)
    assert went_on == ["large"]
    assert closed == []


def test_a_client_that_was_served_does_not_wait_for_one_that_was_not() -> None:
    closed: list[str] = []
    connections = Connections(unfinished_limit_bytes=100)
    for one, size_bytes in ((connection(closed, "stranger"), 90), (known := connection(closed, "known", served=True), 60)):
        connections.enter(one)
        connections.holds(one, size_bytes)
    assert connections.may_go_on(known, lambda: None)
    assert closed == ["stranger"]


def test_deadlines_close_a_connection_unless_what_was_expected_is_done() -> None:
    closed: list[str] = []
    connections = Connections()
    late, done = connection(closed, "late"), connection(closed, "done")
    for one in (late, done):
        connections.enter(one)
        connections.expect(one, "header", -1.0)
    connections.expect(done, "header", None)
    connections.close_overdue()
    connections.close_overdue()
    assert closed == ["late"]
    assert late not in connections


def test_work_of_a_lane_takes_turns() -> None:
    lane = Throttle()
    first, second = lane.pause_s(0.1), lane.pause_s(0.1)
    assert 0.1 < first < second
    assert second > 1.9 * first - 0.1
