"""The wire format, to the letter of the design's section 3, as a plain client hears it."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import helpers
import trio
from helpers import leading_at, until
from plain import BEATS, plain_client

from backbeat_trio import Phase
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

AGENT: Final = "chorus-agent-42"
NODE: Final = "12D3KooW"
guarded = helpers.guarded(120)


def parse(data: bytes) -> Any:
    """Decode JSON, and refuse a key that comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    return json.loads(data, object_pairs_hook=unique)


def same(found: Any, wanted: Any) -> bool:
    """Compare JSON values strictly: 1, 1.0 and true are three different ones."""
    if type(found) is not type(wanted):
        return False
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in found)
    return bool(found == wanted)


def claim(
    task_id: str,
    beat: int,
    state: str,
    left: int,
    progress: float,
    notes: str,
    operation: tuple[str, str, int, int] | None = None,
) -> object:
    fields = ("operation_type", "phase", "peers", "estimated_beats")
    return {
        "type": "backbeat.statusclaim.v1",
        "agent_id": AGENT,
        "task_id": task_id,
        "beat_index": beat,
        "state": state,
        "beats_left": left,
        "progress": progress,
        "notes": notes,
        "cluster_id": CLUSTER_ID,
        **dict(zip(fields, operation or (), strict=operation is not None)),
    }


@guarded
async def test_frames_on_the_wire() -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.beat.>") as plain,
        leading_at(server.url, leader_id="pulse-a") as metronome,
        open_session(nats_url=server.url) as bb,
    ):
        await until(lambda: len(plain.heard) >= 3)
        change = await bb.set_tempo(1200)
        await until(lambda: parse(plain.heard[-1][1])["beat_index"] >= change + 2)
    assert {subject for subject, _ in plain.heard} == {BEATS}
    frames = [parse(data) for _, data in plain.heard]
    epoch = metronome.epoch
    begun = frames[0]["segment"]["t0_ns"]
    slow = {"epoch": epoch, "seq": 0, "beat0": 0, "t0_ns": begun, "milli_bpm": 600_000}
    quick = {
        "epoch": epoch,
        "seq": 1,
        "beat0": change,
        "t0_ns": begun + change * 100_000_000,
        "milli_bpm": 1_200_000,
    }
    last = -1
    announced = 0
    for found in frames:
        index = found["beat_index"]
        assert index > last
        last = index
        before = index < change
        announced += found["next_segment"] is not None
        assert same(
            found,
            {
                "type": "backbeat.beatframe.v1",
                "cluster_id": CLUSTER_ID,
                "beat_index": index,
                "downbeat": index % 8 == 0,
                "phase": "upbeat" if index % 8 else "downbeat",
                "tempo_bpm": 600.0 if before else 1200.0,
                "beats_per_bar": 8,
                "window_id": f"w-{index // 8}",
                "epoch": epoch,
                "leader_id": "pulse-a",
                "segment": slow if before else quick,
                "next_segment": quick if before and announced else None,
                "incarnation": frames[0]["incarnation"],
                # There is no JetStream to keep a record in.
                "alone": True,
            },
        )
    # Announced at least max(2 beats, 250 ms) ahead.
    assert announced >= 2
    assert re.fullmatch("[0-9a-f]{16}", frames[0]["incarnation"])


@guarded
async def test_claims_on_the_wire() -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.status.>") as plain,
        leading_at(server.url),
        open_session(nats_url=server.url, agent_id=AGENT, node_id=NODE) as bb,
    ):

        def objects(task_id: str) -> list[dict[str, Any]]:
            return [
                message
                for message in (parse(data) for _, data in plain.heard)
                if isinstance(message, dict) and message["task_id"] == task_id
            ]

        def arrays() -> list[list[dict[str, Any]]]:
            messages = [parse(data) for _, data in plain.heard]
            return [message for message in messages if isinstance(message, list)]

        election = bb.start_operation("election", id="election-leader-2025", beats=4)
        election.advance(Phase.CONNECTING, peers=3)
        await until(lambda: objects("election-leader-2025"))
        start = objects("election-leader-2025")[0]["beat_index"]
        other = bb.start_operation("gossip")
        # Past its estimate, where nothing is left and the progress stays at 1.
        await until(lambda: any(array[0]["beat_index"] > start + 5 for array in arrays()))
        election.complete(peers=4)
        other.fail("no peers")
        await until(
            lambda: len(objects("election-leader-2025")) == 3 and len(objects(other.id)) == 2
        )
        ended = bb.current_beat()

    assert {subject for subject, _ in plain.heard} == {f"backbeat.status.{AGENT}"}
    transitions = objects("election-leader-2025")
    begun, advanced, done = (message["beat_index"] for message in transitions)
    assert start == begun <= advanced <= done <= ended

    def running_claim(beat: int, phase: str, peers: int) -> object:
        left, passed = max(0, 4 - beat + start), min(1.0, (beat - start) / 4)
        operation = ("election", phase, peers, 4)
        notes = note % (phase, peers)
        return claim("election-leader-2025", beat, "executing", left, passed, notes, operation)

    note = f"P2P election: %s (peers: %d, node: {NODE})"
    assert same(transitions[0], running_claim(begun, "started", 0))
    assert same(transitions[1], running_claim(advanced, "connecting", 3))
    assert same(
        transitions[2],
        claim(
            *("election-leader-2025", done, "done", 0, 1.0),
            note % ("completed", 4),
            ("election", "completed", 4, 4),
        ),
    )
    gossip = objects(other.id)
    assert same(
        gossip[1],
        claim(
            other.id,
            gossip[1]["beat_index"],
            "failed",
            0,
            0.0,
            "P2P operation failed: no peers (type: gossip)",
            ("gossip", "failed", 0, 8),
        ),
    )
    # One array a beat, with each live operation once.
    beats = []
    for array in arrays():
        beat = array[0]["beat_index"]
        beats.append(beat)
        if array[0]["task_id"] == "election-leader-2025":
            assert same(array[0], running_claim(beat, "connecting", 3))
        for entry in array:
            assert entry["beat_index"] == beat
            assert entry["state"] == "executing"
        ids = [entry["task_id"] for entry in array]
        assert len(ids) == len(set(ids))
    assert beats == sorted(set(beats))
    full = [array for array in arrays() if array[0]["beat_index"] > start + 1]
    assert full
    for array in full:
        assert [entry["task_id"] for entry in array] == ["election-leader-2025", other.id]
    # The terminal claim is the last word about an operation.
    parsed = [parse(data) for _, data in plain.heard]
    entries = [
        entry for found in parsed for entry in (found if isinstance(found, list) else [found])
    ]
    mentions = [entry for entry in entries if entry["task_id"] == "election-leader-2025"]
    assert [entry["state"] for entry in mentions[:-1]] == ["executing"] * (len(mentions) - 1)
    assert mentions[-1]["state"] == "done"


@guarded
async def test_health_claims_on_the_wire() -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.status.>") as plain,
        leading_at(server.url),
        open_session(nats_url=server.url, agent_id=AGENT, node_id=NODE) as bb,
    ):

        def claims(state: str) -> list[dict[str, Any]]:
            return [
                message
                for message in (parse(data) for _, data in plain.heard)
                if isinstance(message, dict)
                and message["task_id"] == "chorus-p2p-health"
                and message["state"] == state
            ]

        await until(lambda: claims("waiting"))
        with trio.CancelScope() as scope:
            async with bb.operation("election"), bb.operation("dht_store"):
                await until(lambda: claims("executing"))
                scope.cancel()
        waiting = len(claims("waiting"))
        await until(lambda: len(claims("waiting")) > waiting)
    for state, operations in (("waiting", 0), ("executing", 2)):
        for found in claims(state):
            beat = found["beat_index"]
            notes = (
                f"CHORUS P2P healthy: connected=true, operations={operations}, "
                f"tempo=600 BPM, node={NODE}"
            )
            assert same(found, claim("chorus-p2p-health", beat, state, 0, 1.0, notes))
    # Every 8 beats: one in each window at most.
    windows = [found["beat_index"] // 8 for found in claims("waiting") + claims("executing")]
    assert len(windows) == len(set(windows))
    assert not claims("failed")
    assert not claims("done")


@guarded
async def test_notes_that_need_escapes_survive_the_wire() -> None:
    notes = 'quote " backslash \\ newline \n 🥁 <&> '
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.status.>") as plain,
        open_session(nats_url=server.url, lock_timeout=0.0, agent_id=AGENT) as bb,
    ):
        await until(lambda: bb.health().connected)
        bb.start_operation("election", id='id "\\"').fail(notes)
        await until(lambda: len(plain.heard) >= 2)
    found = parse(plain.heard[-1][1])
    assert found["task_id"] == 'id "\\"'
    assert found["notes"] == f"P2P operation failed: {notes} (type: election)"
