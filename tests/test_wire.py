"""The wire contract: what is sent, to the letter, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from backbeat_trio import _wire as wire
from backbeat_trio._grid.timeline import Timeline

SEGMENT = wire.Segment(7, 3, 12000, 903_000_000_000, 2000)
FRAME = wire.BeatFrame(
    cluster_id="chorus-production",
    beat_index=12344,
    downbeat=True,
    phase="downbeat",
    tempo_bpm=2.0,
    beats_per_bar=8,
    window_id="w-1543",
    epoch=7,
    leader_id="pulse-a",
    segment=SEGMENT,
)
FRAME_JSON = (
    '{"type":"backbeat.beatframe.v1","cluster_id":"chorus-production","beat_index":12344,'
    '"downbeat":true,"phase":"downbeat","tempo_bpm":2.0,"beats_per_bar":8,"window_id":"w-1543",'
    '"epoch":7,"leader_id":"pulse-a","segment":{"epoch":7,"seq":3,"beat0":12000,'
    '"t0_ns":903000000000,"milli_bpm":2000},"next_segment":null}'
)
CLAIM = wire.StatusClaim(
    "chorus-agent-42",
    "election-leader-2025",
    12345,
    "executing",
    5,
    0.0,
    "P2P election: started (peers: 0, node: 12D3KooW)",
)
CLAIM_JSON = (
    '{"type":"backbeat.statusclaim.v1","agent_id":"chorus-agent-42",'
    '"task_id":"election-leader-2025","beat_index":12345,"state":"executing","beats_left":5,'
    '"progress":0.0,"notes":"P2P election: started (peers: 0, node: 12D3KooW)"}'
)


def test_a_frame_to_the_letter() -> None:
    assert wire.encode(FRAME).decode() == FRAME_JSON
    assert wire.decode_frame(FRAME_JSON.encode()) == FRAME


def test_a_claim_to_the_letter() -> None:
    assert wire.encode(CLAIM).decode() == CLAIM_JSON
    assert wire.decode_claims(CLAIM_JSON.encode()) == [CLAIM]
    assert wire.decode_claims(f" [{CLAIM_JSON},{CLAIM_JSON}]".encode()) == [CLAIM, CLAIM]
    assert wire.decode_claims(b"[]") == []


def test_the_optional_fields_of_a_claim_to_the_letter() -> None:
    claim = msgspec.structs.replace(
        CLAIM,
        cluster_id="chorus-production",
        operation_type="election",
        phase="started",
        peers=0,
        estimated_beats=5,
        parent="chorus-agent-7/plan",
        correlation_id="chorus-agent-1/root",
        soft=True,
    )
    text = (
        f'{CLAIM_JSON[:-1]},"cluster_id":"chorus-production","operation_type":"election",'
        '"phase":"started","peers":0,"estimated_beats":5,"parent":"chorus-agent-7/plan",'
        '"correlation_id":"chorus-agent-1/root","soft":true}'
    )
    assert wire.encode(claim).decode() == text
    assert wire.decode_claims(text.encode()) == [claim]


def test_a_claim_of_an_earlier_version_has_no_optional_field() -> None:
    (claim,) = wire.decode_claims(CLAIM_JSON.encode())
    assert claim.cluster_id is claim.operation_type is claim.phase is msgspec.UNSET
    assert claim.peers is claim.estimated_beats is msgspec.UNSET
    assert claim.parent is claim.correlation_id is claim.soft is msgspec.UNSET


def test_readers_of_earlier_versions_ignore_the_optional_fields() -> None:
    # The struct as it was before these fields.
    class Earlier(msgspec.Struct, tag_field="type", tag="backbeat.statusclaim.v1"):
        agent_id: str
        task_id: str
        beat_index: int
        state: wire.ClaimState
        beats_left: int
        progress: float
        notes: str

    claim = msgspec.structs.replace(CLAIM, cluster_id="c", phase="started", peers=1)
    earlier = msgspec.json.decode(wire.encode(claim), type=Earlier)
    assert wire.encode(earlier).decode() == CLAIM_JSON


def test_unknown_fields_are_ignored() -> None:
    value = json.loads(FRAME_JSON) | {"weather": {"rain": True}}
    assert wire.decode_frame(json.dumps(value).encode()) == FRAME


@pytest.mark.parametrize(
    "change",
    [
        {"type": None},
        {"type": "backbeat.beatframe.v2"},
        {"type": ""},
        {"beat_index": "12344"},
        {"beat_index": -1},
        {"beat_index": 2**53 + 1},
        {"beat_index": 11999},
        {"beat_index": 1.5},
        {"phase": "offbeat"},
        {"epoch": -1},
        {"beats_per_bar": 0},
        {"segment": None},
        {"segment": {"epoch": 7, "seq": 3, "beat0": 12000, "t0_ns": 2**63, "milli_bpm": 2000}},
        {"segment": {"epoch": 7, "seq": 3, "beat0": 12000, "t0_ns": 0, "milli_bpm": 99}},
        {"segment": {"epoch": 7, "seq": 3, "beat0": 12000, "t0_ns": 0, "milli_bpm": 6_000_001}},
    ],
)
def test_a_frame_that_is_none(change: dict[str, Any]) -> None:
    value = json.loads(FRAME_JSON) | change
    if change == {"type": None}:
        del value["type"]
    with pytest.raises(msgspec.DecodeError):
        wire.decode_frame(json.dumps(value).encode())


@pytest.mark.parametrize(
    "decode",
    [
        wire.decode_frame,
        wire.decode_claims,
        wire.decode_sync_request,
        wire.decode_sync_reply,
        wire.decode_tempo_request,
        wire.decode_tempo_reply,
        wire.decode_control_request,
        wire.decode_control_reply,
    ],
)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[",
        b"null",
        b"12",
        b'"x"',
        b"{}",
        b"[1]",
        b"[{}]",
        b'[{"type":""}]',
        b'{"type":""}',
        b'{"type":"backbeat.other.v1"}',
        b"\xff\xfe",
        FRAME_JSON[:-9].encode(),
        b'{"type":"backbeat.statusclaim.v1","agent_id":1}',
    ],
)
def test_what_is_no_message_is_a_decode_error(decode: Callable[[bytes], Any], data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for decode in (wire.decode_frame, wire.decode_claims, wire.decode_tempo_request):
        with contextlib.suppress(msgspec.DecodeError):
            decode(data)


def test_subjects() -> None:
    assert wire.beat_subject("c") == "backbeat.beat.c"
    assert wire.status_subject("a") == "backbeat.status.a"
    assert wire.sync_subject("c") == "backbeat.sync.c"
    assert wire.tempo_subject("c") == "backbeat.tempo.c"
    assert wire.control_subject("a") == "backbeat.control.a"


@pytest.mark.parametrize("text", ["a", "A-z_9", "x" * 128])
def test_tokens(text: str) -> None:
    assert wire.is_token(text)


@pytest.mark.parametrize("text", ["", "a.b", "a b", "*", ">", "é", "x" * 129, "a\n", "٣"])
def test_no_tokens(text: str) -> None:
    assert not wire.is_token(text)


@pytest.mark.parametrize(
    ("milli", "text"), [(2000, "2"), (120_500, "120.5"), (100, "0.1"), (1_234_567, "1234.567")]
)
def test_format_bpm(milli: int, text: str) -> None:
    assert wire.format_bpm(milli) == text


def test_windows_and_phases() -> None:
    assert wire.window_id(12344, 8) == "w-1543"
    assert wire.beat_phase(12344, 8) == "downbeat"
    assert wire.beat_phase(12345, 8) == "upbeat"


claims = st.builds(
    wire.StatusClaim,
    st.just("agent"),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.integers(0, 10**6),
    st.sampled_from(["executing", "done", "failed", "waiting"]),
    st.integers(0, 100),
    st.floats(0, 1),
    st.text(st.characters(codec="utf-8"), max_size=400),
    st.sampled_from([msgspec.UNSET, "cluster"]),
)


def is_shortened(claim: wire.StatusClaim, of: wire.StatusClaim) -> bool:
    """Tell whether one claim is another whose notes were too long."""
    notes = claim.notes
    kept = not notes or (notes.endswith("…") and of.notes.startswith(notes[:-1]))
    return kept and msgspec.structs.replace(of, notes=notes) == claim


@given(st.lists(st.lists(claims, max_size=8), max_size=6), st.integers(64, 4000))
def test_arrays_hold_all_claims_that_can_fit_and_keep_the_limit(
    batches: list[list[wire.StatusClaim]], limit: int
) -> None:
    arrays = wire.ClaimArrays(limit)
    messages = [array for batch in batches for array in arrays.add(batch)]
    if last := arrays.take():
        messages.append(last)
    assert all(len(message) <= limit for message in messages)
    heard = [wire.decode_claims(message) for message in messages]
    assert all(heard)
    sent = [claim for batch in batches for claim in batch]
    bare = [wire.encode(msgspec.structs.replace(claim, notes="")) for claim in sent]
    fitting = [c for c, data in zip(sent, bare, strict=True) if len(data) + 2 <= limit]
    assert arrays.dropped == len(sent) - len(fitting)
    for before, after in zip(fitting, [c for batch in heard for c in batch], strict=True):
        assert after == before or is_shortened(after, before)


@given(st.lists(claims, max_size=12), st.integers(64, 4000))
def test_arrays_take_claims_that_are_partly_encoded_as_others(
    batch: list[wire.StatusClaim], limit: int
) -> None:
    fields = ("cluster", "election", "started", 0, 5)
    names = ("cluster_id", "operation_type", "phase", "peers", "estimated_beats")
    full = [
        msgspec.structs.replace(claim, **dict(zip(names, fields, strict=True))) for claim in batch
    ]
    partly = [
        wire.LiveClaim(
            *(claim.agent_id, claim.task_id, claim.beat_index, claim.state, claim.beats_left),
            *(claim.progress, wire.encode_details(claim.notes, *fields)),
        )
        for claim in batch
    ]
    arrays, others = wire.ClaimArrays(limit), wire.ClaimArrays(limit)
    assert [*arrays.add(partly), arrays.take()] == [*others.add(full), others.take()]
    assert arrays.dropped == others.dropped


@given(claims, st.integers(64, 4000))
def test_a_claim_is_shortened_no_more_than_it_must_be(claim: wire.StatusClaim, limit: int) -> None:
    data = wire.encode_claim(claim, limit)
    bare = msgspec.structs.replace(claim, notes="")
    if data is None:
        assert len(wire.encode(bare)) > limit
        return
    assert len(data) <= limit
    (heard,) = wire.decode_claims(data)
    if heard == claim:
        return
    assert is_shortened(heard, claim)
    # One character more would have been too much.
    kept = len(heard.notes[:-1])
    longer = claim.notes[: kept + 1] + "…" if heard.notes else "…"
    assert len(wire.encode(msgspec.structs.replace(claim, notes=longer))) > limit


@pytest.mark.parametrize("limit", [64, 200])
def test_arrays_of_nothing_and_of_claims_too_large(limit: int) -> None:
    arrays = wire.ClaimArrays(limit)
    large = msgspec.structs.replace(CLAIM, task_id="x" * 1000)
    assert arrays.add([]) == []
    assert arrays.add([large] * 3) == []
    assert arrays.take() == b""
    assert arrays.dropped == 3
    assert wire.encode_claim(large, limit) is None


def test_arrays_are_as_few_as_the_limit_allows() -> None:
    arrays = wire.ClaimArrays(1024 * 1024)
    for _ in range(10):
        assert arrays.add([CLAIM] * 100) == []
    assert len(wire.decode_claims(arrays.take())) == 1000
    assert arrays.take() == b""


@pytest.mark.parametrize(
    "notes", ["x" * 2_000_000, "\x00" * 500_000, "\N{GRINNING FACE}" * 400_000]
)
def test_notes_that_no_message_can_hold_are_shortened(notes: str) -> None:
    claim = msgspec.structs.replace(CLAIM, notes=notes)
    data = wire.encode_claim(claim, 1024 * 1024)
    assert data is not None
    assert len(data) <= 1024 * 1024
    (heard,) = wire.decode_claims(data)
    assert heard.notes[:-1] == notes[: len(heard.notes) - 1]
    assert heard.notes.endswith("…")


def test_notes_that_fit_stay() -> None:
    assert wire.encode_claim(CLAIM, 1024) == wire.encode(CLAIM)


def test_the_messages_of_the_documentation_are_messages() -> None:
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / "design.md").read_text() + (docs / "wire.md").read_text()
    messages = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    kinds = {re.search(r'"backbeat\.(\w+)\.v1"', m)[1] for m in messages}  # type: ignore[index]
    assert kinds >= {"beatframe", "statusclaim", "sync", "recall", "tempo", "lead", "metronome"}
    contract = [m.encode() for m in messages]
    record, probe, frame, claim, sync, sync_reply, recall, memory, tempo, tempo_reply = contract[
        :10
    ]
    control, control_reply = contract[10:]
    assert wire.decode_control_request(control).action == "cancel"
    assert wire.decode_control_reply(control_reply).code == "not_cancellable"
    assert wire.decode_recall_request(recall).leader_id == "pulse-b"
    assert wire.decode_recall_reply(memory).role == "agent"
    assert wire.decode_record(record).segments == (SEGMENT,)
    assert wire.decode_probe(probe).epoch == 7
    assert wire.decode_frame(frame) == FRAME
    assert wire.decode_claims(claim)[0].task_id == "election-leader-2025"
    assert wire.decode_sync_request(sync).agent_id == "chorus-agent-42"
    assert wire.decode_sync_reply(sync_reply).segment == SEGMENT
    assert wire.decode_tempo_request(tempo).at_beat is None
    changed = wire.decode_tempo_reply(tempo_reply).segment
    assert changed is not None
    # Its numbers are those that follow from the segment before it.
    assert Timeline((SEGMENT,)).change(120_500, 12360, epoch=7).segments[1] == changed
