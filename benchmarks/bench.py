"""Measure the targets of the design. Both sides of a ratio are measured alternately in one run.

Run it as ``python benchmarks/bench.py [--quick] [--json PATH] [--only NAME ...]``. It prints a
table, and writes it as JSON with the values of every round. A missed target is printed, but does
not make the program fail. Times are wall-clock times of this machine, so run nothing else on it.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any, Final, NamedTuple, TypeVar

import calls
import trio
import trio.testing
import views
from peers import AGENT_ID, END, MARK, NODE_ID, TYPE, Heard, Peer, open_peer, open_process
from prometheus_client.exposition import choose_encoder
from report import Figure, Outcome, Rounds, Target, percentile, run
from trio.lowlevel import TrioToken

from backbeat_trio import BackbeatConfig, NoResponders, Session, Transport, TransportBroken
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._time.clock import BeatClock
from backbeat_trio._time.local import local_ns
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._wire import status_subject
from backbeat_trio.metrics import SessionMetrics, render
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

# After this many seconds a benchmark begins no more rounds. The longest one takes half a minute on
# an idle machine.
LONG: Final = 60.0

T = TypeVar("T")

OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"

TARGETS: Final = {
    "scope": Target("enter and leave a beat scope / trio.move_on_after", "≤", 1.0, "x"),
    "inject": Target("inject, beside 10,000 live budgets", "≤", 10.0, "µs"),
    "extract": Target("extract, entered and left, beyond an empty budget", "≤", 10.0, "µs"),
    "tempo": Target("tempo change with 100,000 live budgets", "≤", 1.0, "ms"),
    "tempo_ratio": Target("tempo change with 100,000 live budgets / with 1,000", "≤", 3.0, "x"),
    "claims": Target("claims of 100,000 live operations, received", "≥", 500_000, "/s"),
    "claims_ratio": Target("claims received / those of nats-py, one by one", "≥", 6.0, "x"),
    "stall": Target("longest stall of Trio's loop meanwhile", "≤", 5.0, "ms"),
    "batched": Target("claims heard by open_claims(batched=True)", "≥", 600_000, "/s"),
    "arrival": Target("frame from the socket's thread to the Trio task", "≤", 0.2, "ms"),
    "beats": Target("lateness of a local beat / trio.sleep_until, p50", "≤", 0.3, "x"),
    "sleeps": Target("lateness of sleep_until(beat) / trio.sleep_until, p50", "≤", 0.3, "x"),
    "request": Target("request with a deadline / nats-py's, p50", "≤", 1.5, "x"),
    "requests": Target("the same, 256 side by side", "≤", 1.2, "x"),
    "serving": Target("requests served a second / by nats.micro", "≥", 0.8, "x"),
    "serving_wait": Target("the same, where a handler waits 5 ms", "≥", 3.0, "x"),
    "metrics": Target("longest stall of Trio's loop for /metrics, 5,000 series", "≤", 5.0, "ms"),
    "operation": Target("memory of a live operation", "≤", 1024, "bytes"),
    "budget": Target("memory of a budget beyond Trio's own scope", "≤", 400, "bytes"),
    "import": Target("import backbeat_trio / import trio, msgspec", "≤", 1.3, "x"),
    "watch": Target("backbeat watch: 60 BPM, 10,000 operations, of a core", "≤", 25.0, "%"),
    "watch_memory": Target("a view of 200,000 operations of 50,000 agents", "≤", 200.0, "MB"),
    "idle": Target("idle: 60 BPM, 1,000 live operations, of a core", "≤", 2.0, "%"),
}


class Sizes(NamedTuple):
    """How much to measure."""

    rounds: int
    batches: int
    budgets: int
    operations: int
    beats: int
    """Beats of claims in one round."""
    messages: int
    seconds: float
    """How long to look at something that only time brings about."""
    imports: int
    objects: int
    calls: int
    """Requests in one round."""


FULL: Final = Sizes(9, 60, 100_000, 100_000, 8, 400, 15.0, 15, 20_000, 5_000)
QUICK: Final = Sizes(2, 6, 2_000, 5_000, 4, 30, 1.5, 1, 1_000, 300)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def time_scopes(make: Callable[[float], Any], count: int) -> float:
    """Return the seconds that entering and leaving a scope takes."""
    begin = time.perf_counter()
    for _ in range(count):
        with make(5):
            pass
    return (time.perf_counter() - begin) / count


async def bench_scope(sizes: Sizes) -> Outcome:
    ours: list[float] = []
    theirs: list[float] = []
    async with open_session(tempo_bpm=60.0) as bb:
        for _ in range(sizes.rounds):
            ours_now: list[float] = []
            theirs_now: list[float] = []
            for batch in range(sizes.batches):
                # In turns, so that neither always comes second.
                sides: list[tuple[Callable[[float], Any], list[float]]] = [
                    (bb.move_on_after, ours_now),
                    (trio.move_on_after, theirs_now),
                ]
                for make, times in sides if batch % 2 else reversed(sides):
                    times.append(time_scopes(make, 100))
                # Trio sweeps its own heap between the turns of its loop only.
                await trio.lowlevel.checkpoint()
            ours.append(median(ours_now))
            theirs.append(median(theirs_now))
    rounds = {"backbeat_s": ours, "trio_s": theirs, "ratio": ratios(ours, theirs)}
    note = f"{median(ours) * 1e6:.2f} µs against {median(theirs) * 1e6:.2f} µs"
    return [Figure("scope", median(rounds["ratio"]), note)], rounds


async def bench_headers(sizes: Sizes) -> Outcome:
    rounds: Rounds = {"inject_s": [], "extract_s": [], "budget_s": []}

    async def hold(beats: float) -> None:
        with bb.move_on_after(beats):
            await trio.sleep_forever()

    async with open_session(tempo_bpm=60.0) as bb, trio.open_nursery() as nursery:
        for number in range(sizes.budgets // 10):
            nursery.start_soon(hold, 1e6 + number)
        await trio.testing.wait_all_tasks_blocked()
        async with bb.operation("task_coordination"):
            for _ in range(sizes.rounds * sizes.batches):
                # Few at a time, so that most rounds are not interrupted on a machine that is busy.
                with bb.fail_after(100):
                    begin = time.perf_counter()
                    for _ in range(20):
                        headers: dict[str, str] = {}
                        bb.inject(headers)
                    rounds["inject_s"].append((time.perf_counter() - begin) / 20)
                one = {"Backbeat-Deadline": headers["Backbeat-Deadline"]}
                begin = time.perf_counter()
                for _ in range(20):
                    with bb.extract(one):
                        pass
                rounds["extract_s"].append((time.perf_counter() - begin) / 20)
                rounds["budget_s"].append(time_scopes(bb.move_on_after, 20))
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    inject, extract, budget = (1e6 * median(times) for times in rounds.values())
    note = f"{extract:.2f} µs, of which {budget:.2f} µs are an empty budget"
    live = f"{sizes.budgets // 10:,} live budgets, a deadline and an operation"
    return [Figure("inject", inject, live), Figure("extract", extract - budget, note)], rounds


def time_adopt(clock: BeatClock, milli: int) -> float:
    """Return the seconds that a change of tempo takes which is in force from now on."""
    changed = clock.grid.timeline.change(milli, clock.index(), epoch=1)
    timeline = Timeline(changed.segments[-1:])
    begin = time.perf_counter()
    clock.grid.adopt(timeline, local_ns())
    return time.perf_counter() - begin


async def bench_tempo(sizes: Sizes) -> Outcome:
    few, many = 1000, sizes.budgets
    rounds: Rounds = {"few_s": [], "many_s": []}
    async with trio.open_nursery() as nursery:
        clocks = []
        entered = []
        for count in (few, many):
            clock = BeatClock.local(60_000, 8)
            await nursery.start(clock.run)
            for number in range(count):
                # The order in which they end is not the one in which they began.
                scope = clock.deadlines.scope_after(10_000.0 + number * 7919 % count)
                entered.append(scope.__enter__())
            clocks.append(clock)
        for turn in range(20 * sizes.rounds):
            for clock, times in zip(clocks, rounds.values(), strict=True):
                await trio.lowlevel.checkpoint()
                times.append(time_adopt(clock, 60_000 + 30_000 * (turn % 2)))
        assert [clock.live_scopes for clock in clocks] == [few, many]
        for scope in reversed(entered):
            scope.__exit__(None, None, None)
        nursery.cancel_scope.cancel()
    rounds["ratio"] = ratios(rounds["many_s"], rounds["few_s"])
    few_ms, many_ms = (1e3 * median(rounds[name]) for name in ("few_s", "many_s"))
    longest = f"{many:,} of them; longest {max(rounds['many_s']) * 1e3:.3f} ms"
    return [
        Figure("tempo", many_ms, longest),
        Figure("tempo_ratio", median(rounds["ratio"]), f"{few_ms:.3f} ms with {few:,}"),
    ], rounds


class Stall(NamedTuple):
    """By how many seconds Trio's loop was late, and for how many of them it had no core."""

    late: float
    coreless: float


def time_without_core() -> float:
    """Return for how many seconds this thread was ready to run and did not; 0.0 where not told."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0


async def watch_stalls(stalls: list[Stall]) -> None:
    """Note by how much Trio's loop is late, every millisecond, until cancelled."""
    while True:
        before, coreless = time.perf_counter(), time_without_core()
        await trio.sleep(0.001)
        late = time.perf_counter() - before - 0.001
        stalls.append(Stall(late, time_without_core() - coreless))


def pin(pid: int, cores: Iterable[int]) -> None:
    """Keep a process to some cores."""
    if sys.platform == "linux":
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)


@contextmanager
def apart(senders: Iterable[int], others: Iterable[int]) -> Generator[str, None, None]:
    """Give those who send a core of their own, as they have where the others are elsewhere.

    Without that, three busy processes share two cores, and it is the kernel that makes the stalls:
    it takes the core away for a tick or two, at times from the thread that holds the GIL.
    """
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) < 2:
        yield "all on the same cores"
        return
    for pid in others:
        pin(pid, cores[1:])
    for pid in senders:
        pin(pid, cores[:1])
    try:
        yield "sender on one core, others on another"
    finally:
        pin(os.getpid(), cores)


async def settle(bb: Session) -> int:
    """Wait until no more claims go out, and return how many have."""
    sent = -1
    while sent != (sent := bb.statistics().claims_sent):  # noqa: ASYNC110 - there is no event
        await trio.sleep(0.1)
    return sent


async def wait_taken_in(transport: Transport) -> None:
    """Wait until the listener has taken in all that was sent before."""
    while True:
        await transport.wait_connected()
        try:
            await transport.request(status_subject(AGENT_ID), MARK, timeout=10.0)
        except NoResponders:
            # The listener is gone, and the run with it.
            raise
        except TransportBroken:
            # A connection that was lost on the way shows in what was lost.
            continue
        return


async def send_beats(bb: Session, listener: Peer, beats: int) -> tuple[Heard, int]:
    """Have the claims of some beats sent, each as soon as the last one's are out.

    Never are more than two beats under way. The server drops a listener that is so slow that more
    than 64 MiB wait for it, and a listener in Python is slower than the sender on a quick machine.
    """
    emitter, transport = bb._runtime.emitter, bb._runtime.transport
    assert emitter is not None
    assert transport is not None
    before = await settle(bb)
    for _ in range(beats):
        # As if a beat had passed: every operation gets on, and its claim changes.
        bb._runtime.operations.rebase(-1)
        emitter.beat()
        while emitter._beat_due:  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.001)
        # By now this beat is being sent, and the mark follows the one before it.
        await wait_taken_in(transport)
    sent = await settle(bb) - before
    while True:
        await transport.wait_connected()
        # A connection that was lost on the way shows in what was lost, and need not end the run.
        with suppress(TransportBroken):
            await transport.publish(status_subject(AGENT_ID), END)
            await transport.flush()
            return await listener.read(Heard), sent


async def bench_claims(sizes: Sizes) -> Outcome:
    subject = status_subject(AGENT_ID)
    rounds: Rounds = defaultdict(list)
    lost = 0
    async with (
        NatsServer() as server,
        open_peer("listen", server.url, subject) as listener,
        open_peer("publish", server.url, subject, str(sizes.operations)) as publisher,
        # Beats come from here only, and the operations' end is nothing to wait for.
        open_session(
            nats_url=server.url,
            agent_id=AGENT_ID,
            node_id=NODE_ID,
            tempo_bpm=0.1,
            lock_timeout=0.0,
            grace_period=0.0,
            require_connection=True,
        ) as bb,
    ):
        with apart((os.getpid(), publisher.pid), (server.pid, listener.pid)) as where:
            for number in range(sizes.operations):
                bb.start_operation(TYPE, id=f"operation-{number:06}", beats=100_000)
            # What starting them had sent, too, is no part of the first round.
            await send_beats(bb, listener, 0)
            begin = trio.current_time()
            for _ in range(sizes.rounds):
                if trio.current_time() > begin + LONG:
                    break
                stalls: list[Stall] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watch_stalls, stalls)
                    heard, sent = await send_beats(bb, listener, sizes.beats)
                    nursery.cancel_scope.cancel()
                lost += abs(sent - heard.claims)
                rounds["backbeat_per_s"].append(heard.rate)
                rounds["stall_s"].append(max(stall.late for stall in stalls))
                rounds["stall_p99_s"].append(percentile((stall.late for stall in stalls), 0.99))
                rounds["own_stall_s"].append(max(stall.late - stall.coreless for stall in stalls))
                await publisher.go()
                single = await listener.read(Heard)
                lost += abs(sizes.operations - single.claims)
                rounds["nats_py_per_s"].append(single.rate)
            reconnects = bb.health().reconnect_count
    rounds["ratio"] = ratios(rounds["backbeat_per_s"], rounds["nats_py_per_s"])
    stall_ms, p99_ms, own_ms = (
        1e3 * median(rounds[name]) for name in ("stall_s", "stall_p99_s", "own_stall_s")
    )
    return [
        Figure(
            "claims",
            median(rounds["backbeat_per_s"]),
            f"{sizes.operations:,} of them, {heard.bytes / heard.claims:.0f} bytes each; "
            f"{lost} lost, {reconnects} reconnects; {where}",
        ),
        Figure(
            "claims_ratio",
            median(rounds["ratio"]),
            f"{median(rounds['nats_py_per_s']):,.0f} /s, encoded beforehand, "
            f"{single.bytes / single.claims:.0f} bytes each",
        ),
        Figure(
            "stall",
            stall_ms,
            f"p99 {p99_ms:.1f} ms; longest of all rounds {max(rounds['stall_s']) * 1e3:.1f} ms; "
            f"without waits for a core {own_ms:.1f} ms",
        ),
    ], rounds


async def hear_claims(bb: Session, publisher: Peer, slices: int, count: int) -> float:
    """Return how many claims a second are heard in batches."""
    heard = first = 0
    begin = end = 0.0
    async with bb.open_claims(AGENT_ID, batched=True) as batches:
        await publisher.go()
        for number in range(1, slices + 1):
            if number < slices:
                # The next ones are under way while these are taken in, and no more than these.
                await publisher.go()
            while heard < number * count:
                batch = await anext(batches)
                end = time.perf_counter()
                if not heard:
                    begin, first = end, len(batch)
                heard += len(batch)
    return (heard - first) / (end - begin)


async def hear_singly(bb: Session, publisher: Peer, count: int) -> float:
    """Return how many claims a second are heard one by one."""
    async with bb.open_claims(AGENT_ID) as claims:
        await publisher.go()
        await anext(claims)
        begin = time.perf_counter()
        for _ in range(count - 1):
            await anext(claims)
    return (count - 1) / (time.perf_counter() - begin)


async def bench_listen(sizes: Sizes) -> Outcome:
    subject = status_subject(AGENT_ID)
    rounds: Rounds = defaultdict(list)
    async with (
        NatsServer() as server,
        open_peer("publish-arrays", server.url, subject, str(sizes.operations)) as publisher,
        open_session(
            nats_url=server.url, lock_timeout=0.0, require_connection=True, health_beats=0
        ) as bb,
    ):
        with apart((os.getpid(),), (server.pid, publisher.pid)) as where:
            for _ in range(sizes.rounds):
                rounds["batched_per_s"].append(
                    await hear_claims(bb, publisher, sizes.beats, sizes.operations)
                )
                rounds["single_per_s"].append(await hear_singly(bb, publisher, sizes.operations))
        transport = bb.statistics().transport
        assert transport is not None
        dropped, reconnects = transport.dropped, transport.connects - 1
    note = (
        f"one by one {median(rounds['single_per_s']):,.0f} /s; "
        f"{dropped} dropped, {reconnects} reconnects; {where.replace('sender', 'listener')}"
    )
    return [Figure("batched", median(rounds["batched_per_s"]), note)], rounds


def hand_over(token: TrioToken, give: Callable[[int], object], wanted: SimpleQueue[bool]) -> None:
    """Hand a stamp to Trio from this thread, whenever one is wanted."""
    while wanted.get():
        # By then the loop is waiting again, as it is for a message.
        time.sleep(0.001)
        token.run_sync_soon(give, time.perf_counter_ns())


async def bench_arrival(sizes: Sizes) -> Outcome:
    rounds: Rounds = {"message_s": [], "run_sync_soon_s": []}
    waits, bare = rounds.values()
    give, take = trio.open_memory_channel[int](1)
    wanted: SimpleQueue[bool] = SimpleQueue()
    token = trio.lowlevel.current_trio_token()
    async with NatsServer() as server, trio.open_nursery() as nursery:
        transport = NatsTransport(BackbeatConfig(nats_url=server.url))
        await nursery.start(transport.run)
        await transport.wait_connected()
        nursery.start_soon(trio.to_thread.run_sync, hand_over, token, give.send_nowait, wanted)
        try:
            async with transport.open_subscription("bench.arrival") as messages:
                for _ in range(sizes.messages):
                    transport.publish_nowait("bench.arrival", b"x" * 400)
                    message = await anext(messages)
                    waits.append((local_ns() - message.received_ns) / 1e9)
                    await trio.sleep(0.002)
                    wanted.put(True)
                    stamp = await take.receive()
                    bare.append((time.perf_counter_ns() - stamp) / 1e9)
        finally:
            wanted.put(False)
        nursery.cancel_scope.cancel()
    note = (
        f"p99 {percentile(waits, 0.99) * 1e3:.2f} ms; "
        f"a bare run_sync_soon takes {median(bare) * 1e3:.3f} ms"
    )
    return [Figure("arrival", median(waits) * 1e3, note)], rounds


async def bench_beats(sizes: Sizes) -> Outcome:
    late: dict[str, list[float]] = {name: [] for name in ("beats", "sleeps", "trio")}
    rounds: Rounds = defaultdict(list)
    # The grid is local, as there is no metronome: one in this process would beat meanwhile.
    async with (
        NatsServer() as server,
        open_session(nats_url=server.url, tempo_bpm=1200.0, lock_timeout=0.0) as bb,
    ):
        clock = bb._clock

        def instant_between() -> float:
            # Anywhere between two milliseconds, and away from what else wakes the loop.
            return clock.index() + 1 + random.uniform(0.2, 0.4)

        async def follow_beats() -> None:
            async for beat in bb.beats():
                late["beats"].append(trio.current_time() - clock.deadline_of(beat.index))

        async def sleep_in_beats() -> None:
            while True:
                position = instant_between()
                await bb.sleep_until(position)
                late["sleeps"].append(trio.current_time() - clock.deadline_of(position))

        async def sleep_in_seconds() -> None:
            while True:
                instant = clock.deadline_of(instant_between() + 0.4)
                await trio.sleep_until(instant)
                late["trio"].append(trio.current_time() - instant)

        async with trio.open_nursery() as nursery:
            for task in (follow_beats, sleep_in_beats, sleep_in_seconds):
                nursery.start_soon(task)
            for _ in range(3):
                for values in late.values():
                    values.clear()
                await trio.sleep(sizes.seconds / 3)
                for name, values in late.items():
                    rounds[f"{name}_s"] += values
                    rounds[f"{name}_p50"].append(percentile(values, 0.5))
                    rounds[f"{name}_p99"].append(percentile(values, 0.99))
            nursery.cancel_scope.cancel()

    def compare(name: str) -> Figure:
        ours, theirs = rounds[f"{name}_p50"], rounds["trio_p50"]
        rounds[f"{name}_ratio"] = ratios(ours, theirs)
        p99, their_p99 = median(rounds[f"{name}_p99"]), median(rounds["trio_p99"])
        note = (
            f"{1e3 * median(ours):.2f} ms against {1e3 * median(theirs):.2f} ms; "
            f"p99 {1e3 * p99:.2f} and {1e3 * their_p99:.2f} ms"
        )
        return Figure(name, median(rounds[f"{name}_ratio"]), note)

    return [compare("beats"), compare("sleeps")], rounds


async def bench_requests(sizes: Sizes) -> Outcome:
    return await calls.bench_requests(sizes.rounds, sizes.calls)


async def bench_serving(sizes: Sizes) -> Outcome:
    return await calls.bench_serving(sizes.rounds, sizes.calls)


async def bench_metrics(sizes: Sizes) -> Outcome:
    rounds: Rounds = defaultdict(list)
    metrics = SessionMetrics(max_types=1_000)
    async with open_session(tempo_bpm=60.0, instruments=[metrics]) as bb:
        for number in range(185):
            for reason in (None, "failed"):
                operation = bb.start_operation(f"type-{number}")
                if reason is None:
                    operation.complete()
                else:
                    operation.fail(reason)
        body, _ = await render(metrics.registry)
        series = sum(not line.startswith(b"#") for line in body.splitlines())
        for _ in range(3 * sizes.rounds):
            stalls: list[Stall] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_stalls, stalls)
                await trio.sleep(0.02)
                stalls.clear()
                begin = time.perf_counter()
                await render(metrics.registry, OPENMETRICS)
                rounds["render_s"].append(time.perf_counter() - begin)
                nursery.cancel_scope.cancel()
            rounds["stall_s"].append(max((stall.late for stall in stalls), default=0.0))
            own = (stall.late - stall.coreless for stall in stalls)
            rounds["own_stall_s"].append(max(own, default=0.0))
            begin = time.perf_counter()
            choose_encoder(OPENMETRICS)[0](metrics.registry)
            rounds["in_loop_s"].append(time.perf_counter() - begin)
    render_ms, in_loop_ms, own_ms = (
        1e3 * median(rounds[name]) for name in ("render_s", "in_loop_s", "own_stall_s")
    )
    note = (
        f"{series:,} series in {render_ms:.0f} ms; without waits for a core {own_ms:.1f} ms; "
        f"in the loop it would take {in_loop_ms:.0f} ms"
    )
    return [Figure("metrics", 1e3 * median(rounds["stall_s"]), note)], rounds


async def traced(make: Callable[[int], T], count: int) -> tuple[float, list[T]]:
    """Make some objects, and return the bytes that each takes."""
    made: list[Any] = [None] * count
    gc.collect()
    tracemalloc.start()
    for number in range(count):
        made[number] = make(number)
    # What was only queued is gone once everybody has done what there was to do.
    await trio.testing.wait_all_tasks_blocked()
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / count, made


async def traced_scopes(make: Callable[[], Any], count: int) -> float:
    """Return the bytes that each of some scopes takes that are entered."""
    size, entered = await traced(lambda _: make().__enter__(), count)
    for scope in reversed(entered):
        scope.__exit__(None, None, None)
    return size


async def bench_memory(sizes: Sizes) -> Outcome:
    count = sizes.objects
    async with open_session(tempo_bpm=1.0) as bb:
        bare = await traced_scopes(trio.CancelScope, count)
        timed = await traced_scopes(lambda: trio.move_on_after(10_000), count)
        budget = await traced_scopes(lambda: bb.move_on_after(10_000), count)
        operation, _ = await traced(
            lambda number: bb.start_operation(TYPE, id=f"operation-{number:06}"), count
        )
        assert bb.health().active_operations == count
    rounds = {"operation": [operation], "budget": [budget], "scope": [bare], "timed_scope": [timed]}
    note = f"beyond a scope without deadline, which Trio's own deadline takes {timed - bare:.0f} on"
    return [
        Figure("operation", operation, f"over {count:,}"),
        Figure("budget", budget - bare, note),
    ], rounds


def time_import(modules: str, cache: str) -> float:
    """Return the seconds that importing modules takes a fresh interpreter."""
    # With its bytecode, as what was installed has it, and written beside no source.
    env = os.environ | {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
    code = (
        f"import time; begin = time.perf_counter(); import {modules}; "
        "print(time.perf_counter() - begin)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    return float(done.stdout)


async def bench_import(sizes: Sizes) -> Outcome:
    rounds: Rounds = {"backbeat_s": [], "trio_s": []}
    with tempfile.TemporaryDirectory() as cache:
        # The first of each compiles.
        for turn in range(sizes.imports + 1):
            for name, modules in (("backbeat_s", "backbeat_trio"), ("trio_s", "trio, msgspec")):
                seconds = await trio.to_thread.run_sync(time_import, modules, cache)
                if turn:
                    rounds[name].append(seconds)
    rounds["ratio"] = ratios(rounds["backbeat_s"], rounds["trio_s"])
    ours_ms, theirs_ms = (1e3 * median(rounds[name]) for name in ("backbeat_s", "trio_s"))
    note = f"{ours_ms:.0f} ms against {theirs_ms:.0f} ms"
    return [Figure("import", median(rounds["ratio"]), note)], rounds


async def bench_idle(sizes: Sizes) -> Outcome:
    pulse = [sys.executable, "-m", "backbeat_trio", "pulse", "--bpm", "60"]
    shares: list[float] = []
    async with (
        NatsServer() as server,
        open_process(
            *(*pulse, "--server", server.url, "--cluster-id", CLUSTER_ID),
            stderr=subprocess.DEVNULL,
        ),
        open_session(nats_url=server.url, agent_id=AGENT_ID, lock_timeout=10.0) as bb,
    ):
        for _ in range(1000):
            bb.start_operation(TYPE, beats=100_000)
        # What starting them took is not part of it.
        await bb.sleep(2)
        health = bb.health()
        assert health.connected
        assert not health.local_degradation
        before = bb.statistics()
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            await trio.sleep(sizes.seconds / 3)
            shares.append((time.process_time() - cpu) / (time.perf_counter() - wall))
        after = bb.statistics()
    note = (
        f"{after.frames - before.frames} frames heard, "
        f"{after.claims_sent - before.claims_sent:,} claims sent meanwhile"
    )
    return [Figure("idle", 100 * median(shares), note)], {"share": shares}


async def bench_watch(sizes: Sizes) -> Outcome:
    return await views.bench_watch(min(sizes.operations, 10_000), max(sizes.seconds / 3, 1.0))


async def bench_watch_memory(sizes: Sizes) -> Outcome:
    return await views.bench_watch_memory(sizes.budgets // 2, 2 * sizes.budgets)


BENCHMARKS: Final[dict[str, Callable[[Sizes], Awaitable[Outcome]]]] = {
    "scope": bench_scope,
    "headers": bench_headers,
    "tempo": bench_tempo,
    "claims": bench_claims,
    "listen": bench_listen,
    "arrival": bench_arrival,
    "beats": bench_beats,
    "requests": bench_requests,
    "serving": bench_serving,
    "metrics": bench_metrics,
    "memory": bench_memory,
    "import": bench_import,
    "watch": bench_watch,
    "watch_memory": bench_watch_memory,
    "idle": bench_idle,
}


def main() -> None:
    # A session that ends with so many operations live has something to say about it.
    logging.getLogger("backbeat_trio").setLevel(logging.ERROR)
    run("bench", "Measure what the design promises.", BENCHMARKS, TARGETS, full=FULL, quick=QUICK)


if __name__ == "__main__":
    main()
