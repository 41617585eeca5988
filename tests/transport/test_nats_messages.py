"""Messages over NATS: refused ones, hostile ones, floods, and when each was received."""

from __future__ import annotations

import itertools
import time
from typing import Any

import helpers
import nats.aio.client
import nats.errors
import nats.js.errors
import pytest
import trio
from helpers import degraded, leading_at, running, until
from plain import BEATS, dump, flood, frame, plain_client

from backbeat_trio import TransportBroken
from backbeat_trio._time.local import local_ns
from backbeat_trio._transport import nats as _nats, nats_incoming as _nats_incoming
from backbeat_trio.testing import AGENT_ID, CLUSTER_ID, NatsServer, open_recorder, open_session

guarded = helpers.guarded(120)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            nats.js.errors.BadRequestError(400, "stream names it 'x'", 10001),
            "JetStream on {url}: stream names it 'x'",
        ),
        (nats.js.errors.ServiceUnavailableError(), "JetStream on {url}: it does not answer"),
        (nats.errors.TimeoutError(), "JetStream on {url}: no answer in time"),
        (nats.errors.ConnectionClosedError(), "no connection to {url}: connection closed"),
    ],
)
@guarded
async def test_what_becomes_of_a_call_is_told_in_its_own_words(error: Exception, told: str) -> None:
    async def refused(client: nats.aio.client.Client) -> None:
        raise error

    async with NatsServer() as server, running(nats_url=server.url) as transport:
        await transport.wait_connected()
        with pytest.raises(TransportBroken) as caught:
            await transport.call(refused)
        assert str(caught.value) == told.format(url=server.url)
        assert transport.connected


def permitted(publish: str) -> str:
    permissions = f"permissions: {{ publish: {{ {publish} }} }}"
    return f"authorization {{ users = [{{user: agent, password: x, {permissions}}}] }}"


@guarded
async def test_status_that_may_not_be_published() -> None:
    async with (
        NatsServer(config=permitted('deny: ["backbeat.status.>"]')) as server,
        open_session(nats_url=server.url, user="agent", password="x", lock_timeout=0.0) as bb,
    ):
        await until(lambda: bb.health().connected)
        bb.start_operation("election", id="unheard")
        await until(lambda: bb.health().errors)
        assert f"backbeat.status.{AGENT_ID}" in bb.health().errors[-1]
        assert "permission denied" in bb.health().errors[-1]
        transport = bb.statistics().transport
        assert transport is not None
        assert transport.permission_errors >= 1
        # A refusal is no loss of the connection.
        assert bb.health().connected
        assert bb.health().reconnect_count == 0


@guarded
async def test_health_claims_tell_of_refusals() -> None:
    async with (
        NatsServer(config=permitted(f'deny: ["backbeat.sync.{CLUSTER_ID}"]')) as server,
        open_session(
            nats_url=server.url,
            user="agent",
            password="x",
            lock_timeout=0.0,
            tempo_bpm=600.0,
            health_beats=2,
        ) as bb,
        open_recorder(bb) as recorder,
    ):
        claim = await recorder.wait_for("chorus-p2p-health", "failed")
        assert claim.notes.startswith("CHORUS P2P unhealthy: connected=true, operations=0, ")
        assert bb.health().connected


@guarded
async def test_ten_thousand_hostile_messages() -> None:
    # Beats are slow, so that none is late enough for holdover even on a busy machine. In holdover a
    # lower epoch may be that of a metronome that began anew.
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        leading_at(server.url, tempo_bpm=60.0) as metronome,
        open_session(nats_url=server.url) as bb,
    ):
        await until(lambda: bb.statistics().frames >= 2)
        # The leader has no record, and would yield to one that has.
        good = frame(9, epoch=metronome.epoch) | {"alone": True}
        truncated = [dump(good)[:length] for length in range(len(dump(good)))]
        wrongs: tuple[dict[str, Any], ...] = (
            {"type": "backbeat.statusclaim.v1"},
            {"type": None},
            {"cluster_id": 5},
            {"beat_index": "9"},
            {"beat_index": 9.5},
            {"beat_index": -1},
            {"beat_index": 2**64},
            {"beat_index": True},
            {"beat_index": None},
            {"downbeat": 0},
            {"phase": "offbeat"},
            {"tempo_bpm": "fast"},
            {"beats_per_bar": 0},
            {"window_id": []},
            {"epoch": 1e300},
            {"segment": None},
            {"segment": good["segment"] | {"milli_bpm": 0}},
            {"segment": good["segment"] | {"beat0": 10}},
            {"next_segment": 1},
        )
        wrong_types = [dump(good | wrong) for wrong in wrongs]
        wrong_types += [
            b"",
            b"null",
            b"[]",
            b"{}",
            b"7",
            b'"beat"',
            dump([good]),
            b"\x00\xff\xfe" * 9,
        ]
        huge = [b"x" * 1024 * 1024, dump(good | {"window_id": "w" * 1_048_000})[:-1]]
        foreign = [dump(good | {"cluster_id": f"cluster-{number}"}) for number in range(50)]
        going_back = [dump(good | {"beat_index": 0})]
        lower_epoch = [
            dump(good | {"epoch": metronome.epoch - number, "beat_index": 10**6})
            for number in (1, 2, metronome.epoch)
        ]
        counts = {"undecodable": 5000, "foreign": 2000, "repeated": 1500, "stale_epoch": 1500}
        bad = itertools.chain(huge * 5, itertools.cycle(truncated + wrong_types))
        messages = [
            *itertools.islice(bad, counts["undecodable"]),
            *itertools.islice(itertools.cycle(foreign), counts["foreign"]),
            *itertools.islice(itertools.cycle(going_back), counts["repeated"]),
            *itertools.islice(itertools.cycle(lower_epoch), counts["stale_epoch"]),
        ]
        assert len(messages) == 10_000
        before = bb.statistics()

        def counted() -> dict[str, int]:
            now = bb.statistics()
            return {
                name: getattr(now, f"frames_{name}") - getattr(before, f"frames_{name}")
                for name in counts
            }

        indices: list[int] = []
        fired: list[float] = []

        async def listen() -> None:
            async for beat in bb.beats():
                indices.append(beat.index)

        async def spend() -> None:
            while True:
                with bb.move_on_after(1) as scope:
                    await trio.sleep_forever()
                assert scope.cancelled_caught
                fired.append(bb.current_position())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            nursery.start_soon(spend)
            # In parts, so that what is counted as dropped elsewhere stays nothing.
            for number in range(0, 10_000, 500):
                await plain.publish((BEATS, data) for data in messages[number : number + 500])
                end = number + 500
                await until(lambda: sum(counted().values()) >= end)  # noqa: B023 - awaited here
            await until(lambda: len(fired) >= 4)
            nursery.cancel_scope.cancel()
        assert counted() == counts
        transport = bb.statistics().transport
        assert transport is not None
        assert transport.dropped == 0
        assert indices == sorted(set(indices))
        assert indices
        # The clock is where it was, on the same grid.
        frames = bb.statistics().frames
        await until(lambda: bb.statistics().frames > frames)
        assert bb.statistics().locks == 1
        assert not bb.health().local_degradation
        await until(lambda: bb.current_beat() == metronome.current_beat())


@pytest.mark.parametrize(
    "data",
    [
        dump(frame(9))[:-1] + b', "more": ' + b"[" * 100_000,
        dump(frame(9))[:-1] + b', "more": ' + b'{"a":' * 100_000,
        dump(frame(9)).replace(CLUSTER_ID.encode(), b"\xff\xfe"),
        dump(frame(9)).replace(b"beatframe", b"\xff\xfe"),
        dump(frame(9)).replace(b"by-hand", b"\\ud800"),
    ],
    ids=["nested arrays", "nested objects", "no UTF-8", "no UTF-8 in the type", "lone surrogate"],
)
@pytest.mark.parametrize("subject", ["beat", "sync", "tempo", "status"])
@guarded
async def test_what_cannot_be_decoded_never_ends_a_session(subject: str, data: bytes) -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        leading_at(server.url) as metronome,
        open_session(nats_url=server.url) as bb,
        open_recorder(bb) as recorder,
    ):
        target = AGENT_ID if subject == "status" else CLUSTER_ID
        for kind in ("beatframe", "sync", "tempo", "statusclaim"):
            message = data.replace(b"beatframe", kind.encode())
            await plain.publish([(f"backbeat.{subject}.{target}", message)])
        await until(
            lambda: (
                bb.statistics().frames_undecodable
                + bb.statistics().claims_undecodable
                + metronome.statistics().undecodable
                >= 4
            )
        )
        frames, syncs = bb.statistics().frames, metronome.statistics().syncs
        await until(lambda: bb.statistics().frames > frames)
        await until(lambda: metronome.statistics().syncs > syncs)
        bb.start_operation("election", id="after").complete()
        await recorder.wait_for("after", "done")


@guarded
async def test_frame_from_far_ahead_does_not_silence_the_metronome() -> None:
    # One corrupt or forged index would otherwise make every frame that follows an old one.
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        leading_at(server.url) as metronome,
        open_session(nats_url=server.url) as bb,
    ):
        await until(lambda: bb.statistics().frames >= 2)
        segment = {"epoch": metronome.epoch, "seq": 0, "beat0": 0, "t0_ns": 0}
        forged = frame(2**53, epoch=metronome.epoch, segment=segment | {"milli_bpm": 600_000})
        await plain.publish([(BEATS, dump(forged))])
        async with plain_client(server.url, BEATS) as witness:
            await until(lambda: len(witness.heard) >= 10)
        frames = bb.statistics().frames
        await until(lambda: bb.statistics().frames > frames + 2)
        await degraded(bb, False)


@guarded
async def test_flood_is_bounded_and_counted_and_no_loss_of_the_connection() -> None:
    # It takes a while to read; what the server says to a ping comes after all of it. There are a
    # few more than may wait for Trio's loop.
    sent = 70_000
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        running(nats_url=server.url) as transport,
        transport.open_subscription("flood", capacity=100) as messages,
    ):
        await transport.wait_connected()
        # The subscription is older than the connection: only now the server knows of it.
        await transport.flush()
        # Trio's loop is stuck meanwhile.
        flood(server, "flood", sent)
        await until(lambda: transport.statistics().dropped >= sent - 100)
        assert transport.statistics().dropped == sent - 100
        assert [(await anext(messages)).data for _ in range(100)] == [b"x"] * 100
        await plain.publish([("flood", b"end")])
        assert (await anext(messages)).data == b"end"
        assert transport.generation == 1


@guarded
async def test_stamps_of_a_thread_that_was_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    # The scheduler may stop a thread between its two looks at the clocks. What is measured then is
    # wrong by as much, and no round trip shows it.
    readings = itertools.count()

    def interrupted() -> int:
        now = local_ns()
        if next(readings) % 2 == 0:
            time.sleep(0.02)
        return now

    async with (
        NatsServer() as server,
        running(nats_url=server.url) as transport,
        transport.open_subscription("a") as messages,
    ):
        await transport.wait_connected()
        monkeypatch.setattr(_nats_incoming, "local_ns", interrupted)
        for _ in range(20):
            before = local_ns()
            await transport.publish("a", b"")
            message = await anext(messages)
            assert before - 1_000_000 <= message.received_ns <= local_ns() + 1_000_000


@guarded
async def test_use_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    async with NatsServer() as server, running(nats_url=server.url) as transport:
        await transport.wait_connected()
        with monkeypatch.context() as patch:
            patch.setattr(_nats, "_forks", _nats._forks + 1)
            with pytest.raises(TransportBroken, match="forked"):
                transport.publish_nowait("a", b"")
            with pytest.raises(TransportBroken, match="forked"):
                await transport.request("a", b"", timeout=1)
        await transport.publish("a", b"")
        await transport.flush()
