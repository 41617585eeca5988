"""The wire contract, version 1: structs, subjects and codecs.

Every message is JSON and has a field ``type``. Unknown fields are ignored, so that a later version
may add some. Decoding a message that is not valid raises `msgspec.DecodeError`. The receiver counts
such a message, and drops it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

MIN_MILLI_BPM: Final = 100
MAX_MILLI_BPM: Final = 6_000_000
MAX_BEATS_PER_BAR: Final = 1_000_000

# Bounds are part of the types. An integer that a float cannot hold exactly would make positions
# differ between agents, and computing with one of any size could take for ever.
MAX_INDEX: Final = 2**53
MAX_NS: Final = 2**62
Index: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_INDEX)]
Nanoseconds: TypeAlias = Annotated[int, Meta(ge=-MAX_NS, le=MAX_NS)]
Milliseconds: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_INDEX)]
MilliBPM: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_MILLI_BPM)]
BeatsPerBar: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_BEATS_PER_BAR)]
Uncertainty: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_NS)]
Wait: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_NS)]
Identity: TypeAlias = Annotated[str, Meta(max_length=128)]

# The most characters of the type or the id of an operation, and of a reason to cancel one.
MAX_NAME: Final = 1000
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]

ClaimState: TypeAlias = Literal["executing", "done", "failed", "waiting"]
BeatPhase: TypeAlias = Literal["downbeat", "upbeat"]
Role: TypeAlias = Literal["leader", "standby", "agent"]

HEALTH_TASK_ID: Final = "chorus-p2p-health"

_ELLIPSIS: Final = "\N{HORIZONTAL ELLIPSIS}"
_ELLIPSIS_BYTES: Final = len(_ELLIPSIS.encode())

MAX_TOKEN: Final = 128
TOKEN: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_TOKEN}}}", re.ASCII)


class Segment(Struct, frozen=True, gc=False):
    """A straight piece of the grid: from one beat on, the tempo stays the same.

    All times of beats are computed from segments in exact integers. So they come out the same in
    every process.

    Attributes:
      epoch: the number of the term of leadership in which it was made, 0 to 2**53.
      seq: the number of the segment on this grid, 0 to 2**53; each later segment has a higher one.
      beat0: the index of its first beat, 0 to 2**53.
      t0_ns: the cluster time of that beat, in nanoseconds.
      milli_bpm: its tempo, in thousandths of a beat per minute, 100 to 6,000,000; 0 if the grid is
        paused on that beat.

    """

    epoch: Index
    seq: Index
    beat0: Index
    t0_ns: Nanoseconds
    milli_bpm: MilliBPM

    def __post_init__(self) -> None:
        if 0 < self.milli_bpm < MIN_MILLI_BPM:
            raise ValueError("`milli_bpm` is neither 0 nor a tempo")


ContestedIds: TypeAlias = Annotated[tuple[Identity, ...], Meta(max_length=64)]
LaterSegments: TypeAlias = Annotated[tuple[Segment, ...], Meta(max_length=1024)]


class BeatFrame(Struct, frozen=True, tag_field="type", tag="backbeat.beatframe.v1"):
    """The message that the metronome that leads publishes on every beat."""

    cluster_id: str
    beat_index: Index
    downbeat: bool
    phase: BeatPhase
    tempo_bpm: float
    beats_per_bar: BeatsPerBar
    window_id: str
    epoch: Index
    leader_id: str
    segment: Segment
    next_segment: Segment | None = None
    later_segments: LaterSegments | UnsetType = UNSET
    incarnation: Identity | UnsetType = UNSET
    """The grid's identity. A cluster that begins a new grid gives it a new one."""
    alone: bool | UnsetType = UNSET
    """True if the leader has no record, so that a metronome that has one takes precedence."""
    contested: ContestedIds | UnsetType = UNSET
    """Ids that more than one process has used lately. An agent that has one of them pings at once,
    which shows whether two live agents have it."""

    def __post_init__(self) -> None:
        if self.segment.beat0 > self.beat_index:
            raise ValueError("`segment.beat0` is later than `beat_index`")
        if not self.segment.milli_bpm and self.beat_index != self.segment.beat0:
            raise ValueError("`beat_index` is not the beat on which the grid is paused")


class StatusClaim(Struct, frozen=True, gc=False, tag_field="type", tag="backbeat.statusclaim.v1"):
    """A status message of one operation, or of an agent's health.

    The fields after ``notes`` are optional. Agents of earlier versions leave them out, and a claim
    of an agent's health has only ``cluster_id`` of them. A field that a claim does not have is
    `msgspec.UNSET`, which is false, so ``claim.operation_type or ""`` is always a string.

    Attributes:
      agent_id: the agent that published the claim.
      task_id: the id of the operation; ``"chorus-p2p-health"`` in a claim of the agent's health.
      beat_index: the index of the beat on which the claim was made.
      state: the state of the operation: ``"executing"``, ``"done"`` or ``"failed"``. In a claim of
        the agent's health, ``"waiting"`` without live operations, ``"executing"`` with some, and
        ``"failed"`` while the agent has errors to report.
      beats_left: how many beats of the estimate are left, 0 or more.
      progress: how much of the estimate has passed, from 0.0 to 1.0; 0.0 after a failure.
      notes: a description for people to read, which contains the reason of a failure.
      cluster_id: the cluster whose beats the claim counts.
      operation_type: the type of the operation, such as ``"election"``.
      phase: the phase of the operation in lower case, from ``"started"`` to ``"completed"``, or
        ``"failed"``. Later versions may add phases.
      peers: how many peers take part in the operation, 0 or more.
      estimated_beats: how many beats the operation was expected to take when it started, 1 or more.
      parent: the operation inside which this one was opened, as ``"<agent id>/<operation id>"``;
        absent if there is none.
      correlation_id: the outermost of the operations around this one, in the same form; absent if
        there is no parent.
      soft: True from when the operation should wind down; absent before.

    """

    agent_id: str
    task_id: str
    beat_index: int
    state: ClaimState
    beats_left: int
    progress: float
    notes: str
    cluster_id: str | UnsetType = UNSET
    operation_type: str | UnsetType = UNSET
    phase: str | UnsetType = UNSET
    peers: int | UnsetType = UNSET
    estimated_beats: int | UnsetType = UNSET
    parent: str | UnsetType = UNSET
    correlation_id: str | UnsetType = UNSET
    soft: bool | UnsetType = UNSET


class LiveClaim(Struct, frozen=True, gc=False, tag_field="type", tag="backbeat.statusclaim.v1"):
    """A `StatusClaim` of a live operation, whose last fields are encoded already.

    These are the fields that stay the same between beats. Encoding it gives the same bytes as the
    `StatusClaim`, in less time.
    """

    agent_id: str
    task_id: str
    beat_index: int
    state: ClaimState
    beats_left: int
    progress: float
    notes: Raw
    """The notes and all fields after them; see `encode_details`."""


def encode_details(
    notes: str,
    cluster_id: str,
    operation_type: str,
    phase: str,
    peers: int,
    estimated_beats: int,
    parent: str | UnsetType = UNSET,
    correlation_id: str | UnsetType = UNSET,
    soft: bool | UnsetType = UNSET,
) -> Raw:
    """Encode the notes of a claim and all fields after them, for `LiveClaim`."""
    claim = StatusClaim(
        *("", "", 0, "executing", 0, 0.0),
        *(notes, cluster_id, operation_type, phase, peers, estimated_beats),
        *(parent, correlation_id, soft),
    )
    # Neither the fields before it nor `type` contain this.
    _, _, details = encode(claim).partition(b'"notes":')
    return Raw(details[:-1])


class SyncRequest(Struct, frozen=True, tag_field="type", tag="backbeat.sync.v1"):
    """A ping by which an agent measures its offset to cluster time."""

    cluster_id: str
    agent_id: Identity
    """The leader may name it in frames, as one of the ``contested`` ids."""
    role: Identity | UnsetType = UNSET
    """The `Role` of the sender if it is not an agent. A role that is unknown is not an error."""
    process: Identity | UnsetType = UNSET
    """A name that no other process has, if the sender must be the only one with its id."""


class SyncReply(Struct, frozen=True, tag_field="type", tag="backbeat.sync.v1"):
    """The leader's answer to a ping: the grid, and when the ping came and the answer left.

    Both times are cluster time.
    """

    cluster_id: str
    epoch: Index
    leader_id: str
    received_ns: Nanoseconds
    sent_ns: Nanoseconds
    beats_per_bar: BeatsPerBar
    segment: Segment
    next_segment: Segment | None = None
    later_segments: LaterSegments | UnsetType = UNSET
    incarnation: Identity | UnsetType = UNSET
    alone: bool | UnsetType = UNSET
    uncertainty_ns: Uncertainty | UnsetType = UNSET
    """How much the leader's cluster time may differ from that of the grid's first leader."""
    standbys: Index | UnsetType = UNSET
    """How many metronomes stand by, as far as the leader has heard of them."""
    wait_ns: Wait | UnsetType = UNSET
    """How long to wait before the next ping, if the leader gets too many."""
    shared_id: bool | UnsetType = UNSET
    """True if another live process pings as the same agent."""


class RecallRequest(Struct, frozen=True, tag_field="type", tag="backbeat.recall.v1"):
    """A request of a metronome that finds no leader, to all processes that know the grid."""

    cluster_id: str
    leader_id: str


class RecallReply(Struct, frozen=True, tag_field="type", tag="backbeat.recall.v1"):
    """The answer of a process that is locked to the grid: the grid, and its cluster time."""

    cluster_id: str
    agent_id: str
    role: Role
    epoch: Index
    received_ns: Nanoseconds
    """The cluster time at which the request came."""
    sent_ns: Nanoseconds
    """The cluster time at which the answer left."""
    uncertainty_ns: Uncertainty
    """How much these two may be wrong."""
    last_beat: Annotated[int, Meta(ge=-1, le=MAX_INDEX)]
    """The last beat that the process has delivered to its tasks."""
    beats_per_bar: BeatsPerBar
    segment: Segment
    next_segment: Segment | None = None
    later_segments: LaterSegments | UnsetType = UNSET
    incarnation: Identity | UnsetType = UNSET
    alone: bool | UnsetType = UNSET


class TempoRequest(Struct, frozen=True, tag_field="type", tag="backbeat.tempo.v1"):
    """An operator's request to change the tempo.

    A ``tempo_bpm`` of 0 pauses the grid, and None resumes it at the tempo that it had before. An
    ``at_beat`` of None is the next downbeat that leaves enough time. ``over_beats`` is the number
    of beats over which the tempo changes.
    """

    cluster_id: str
    tempo_bpm: float | None
    at_beat: Index | None = None
    over_beats: Index | UnsetType = UNSET


class TempoReply(Struct, frozen=True, tag_field="type", tag="backbeat.tempo.v1"):
    """The leader's answer: the segment that was committed, or the reason why none was."""

    cluster_id: str
    ok: bool
    error: str | None = None
    epoch: Index | None = None
    effective_beat: Index | None = None
    segment: Segment | None = None


class ControlRequest(Struct, frozen=True, tag_field="type", tag="backbeat.control.v1"):
    """A request to an agent about one of its operations, on `control_subject`.

    Attributes:
      cluster_id: the cluster of the agent.
      action: what to do; ``"cancel"`` is all that there is. One that is unknown is refused.
      operation_id: the operation.
      reason: why, for people to read.
      asked_by: the agent id of whoever asks.

    """

    cluster_id: Identity
    action: Identity
    operation_id: Name
    reason: Name
    asked_by: Identity


class ControlReply(Struct, frozen=True, tag_field="type", tag="backbeat.control.v1"):
    """The agent's answer: it is done, or why not.

    Attributes:
      cluster_id: the cluster of the agent.
      agent_id: the agent.
      ok: whether it is done.
      code: ``"not_found"``, ``"not_cancellable"`` or ``"unknown_action"`` if it is not done. Later
        versions may add codes.
      error: the same for people to read.

    """

    cluster_id: Identity
    agent_id: Identity
    ok: bool
    code: Identity | None = None
    error: Annotated[str, Meta(max_length=MAX_NAME)] | None = None


class Probe(Struct, frozen=True, tag_field="type", tag="backbeat.lead.v1"):
    """A request that asks whether the leader of an epoch lives, and also its answer."""

    cluster_id: str
    epoch: Index
    leader_id: str


class Record(Struct, frozen=True, tag_field="type", tag="backbeat.metronome.v1"):
    """What the metronomes of a cluster store of the grid, so that the next leader continues it."""

    cluster_id: str
    incarnation: str
    epoch: Index
    nonce: str
    leader_id: str
    beats_per_bar: BeatsPerBar
    segments: Annotated[tuple[Segment, ...], Meta(min_length=1)]
    high_water: Annotated[int, Meta(ge=-1, le=MAX_INDEX // 2)]
    milli_bpm: Annotated[int, Meta(ge=MIN_MILLI_BPM, le=MAX_MILLI_BPM)]
    """The tempo at which a paused grid resumes."""
    announced_seq: Annotated[int, Meta(ge=-1, le=MAX_INDEX)] = msgspec.field(
        default=MAX_INDEX, name="told_seq"
    )
    """The last segment that a frame or an answer has announced; by default all of them were."""
    written_ms: Milliseconds | None = None
    """When it was written, by the writer's wall clock. It is used if nobody knows the cluster time
    any more."""
    written_ns: Nanoseconds | None = None
    """The cluster time at which it was written."""


class _Other(Struct, tag_field="type", tag=""):
    # A second member makes each decoder's type a tagged union. Only then does msgspec require that
    # a message has a `type` at all.
    pass


T = TypeVar("T", bound=Struct)

encode: Final[Callable[[Any], bytes]] = msgspec.json.Encoder().encode


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    # The decoder raises these two as they are.
    try:
        return decoder.decode(data)
    except (RecursionError, UnicodeDecodeError) as error:
        raise msgspec.DecodeError(str(error)) from None


def _decoder(kind: type[T]) -> Callable[[bytes], T]:
    union: Any = kind | _Other
    decoder = msgspec.json.Decoder(union)

    def decode_kind(data: bytes) -> T:
        message = _decode(decoder, data)
        if not isinstance(message, kind):
            raise msgspec.ValidationError("Invalid value '' - at `$.type`")
        return message

    return decode_kind


# Each raises `msgspec.DecodeError` unless the data is such a message.
decode_frame: Final = _decoder(BeatFrame)
decode_sync_request: Final = _decoder(SyncRequest)
decode_sync_reply: Final = _decoder(SyncReply)
decode_tempo_request: Final = _decoder(TempoRequest)
decode_tempo_reply: Final = _decoder(TempoReply)
decode_control_request: Final = _decoder(ControlRequest)
decode_control_reply: Final = _decoder(ControlReply)
decode_probe: Final = _decoder(Probe)
decode_recall_request: Final = _decoder(RecallRequest)
decode_recall_reply: Final = _decoder(RecallReply)
decode_record: Final = _decoder(Record)
_decode_claim: Final = _decoder(StatusClaim)
_claim_arrays: Final = msgspec.json.Decoder(list[StatusClaim | _Other])


def decode_claims(data: bytes) -> list[StatusClaim]:
    """Decode one claim, or an array of them; raise `msgspec.DecodeError` if it is neither."""
    if not data.lstrip().startswith(b"["):
        return [_decode_claim(data)]
    claims = _decode(_claim_arrays, data)
    known = [claim for claim in claims if isinstance(claim, StatusClaim)]
    if len(known) != len(claims):
        raise msgspec.ValidationError("Invalid value '' - at `$[...].type`")
    return known


def beat_subject(cluster_id: str) -> str:
    """Return the subject on which the leader publishes frames."""
    return f"backbeat.beat.{cluster_id}"


def status_subject(agent_id: str) -> str:
    """Return the subject on which an agent publishes claims; ``*`` stands for every agent."""
    return f"backbeat.status.{agent_id}"


def sync_subject(cluster_id: str) -> str:
    """Return the subject on which the leader answers pings."""
    return f"backbeat.sync.{cluster_id}"


def tempo_subject(cluster_id: str) -> str:
    """Return the subject on which the leader takes tempo requests."""
    return f"backbeat.tempo.{cluster_id}"


def control_subject(agent_id: str) -> str:
    """Return the subject on which an agent takes requests about its operations."""
    return f"backbeat.control.{agent_id}"


def lead_subject(cluster_id: str, epoch: int) -> str:
    """Return the subject on which the leader of an epoch answers probes."""
    return f"backbeat.lead.{cluster_id}.{epoch}"


def recall_subject(cluster_id: str) -> str:
    """Return the subject on which processes that are locked answer what they know of the grid."""
    return f"backbeat.recall.{cluster_id}"


def cancel_subject(subject: str) -> str:
    """Return where the caller of a request on a subject says that it waits no longer."""
    return f"backbeat.cancel.{subject}"


def bucket_of(cluster_id: str) -> str:
    """Return the name of the JetStream key-value bucket in which metronomes keep the grid."""
    return f"backbeat-{cluster_id}"


def is_token(text: object) -> bool:
    """Tell whether ``text`` may stand as one token of a subject."""
    return isinstance(text, str) and TOKEN.fullmatch(text) is not None


def is_inbox(reply: str) -> bool:
    """Tell whether a subject is one on which an answer may be published.

    The server checks who publishes on a subject, but not who asks for an answer on it. Without this
    check, a client could make another one publish on a subject that only the other one may use.
    """
    return bool(reply) and not reply.startswith(("backbeat.", "$"))


def window_id(index: int, beats_per_bar: int) -> str:
    """Return the name of the window (the bar) that a beat belongs to."""
    return f"w-{index // beats_per_bar}"


def beat_phase(index: int, beats_per_bar: int) -> BeatPhase:
    """Return ``"downbeat"`` for the first beat of a bar, ``"upbeat"`` for the others."""
    return "upbeat" if index % beats_per_bar else "downbeat"


def is_terminal(claim: StatusClaim) -> bool:
    """Tell whether a claim is the last one of an operation."""
    # A claim of an agent's health may be "failed", too.
    return claim.state in ("done", "failed") and claim.task_id != HEALTH_TASK_ID


def format_bpm(milli_bpm: int) -> str:
    """Write a tempo as people do: ``2`` and not ``2.0``, ``120.5``, at most three decimals."""
    return f"{milli_bpm / 1000:.3f}".rstrip("0").rstrip(".")


def encode_claim(claim: StatusClaim, limit: int) -> bytes | None:
    """Encode one claim in at most ``limit`` bytes, and shorten its notes if they are too long.

    Returns:
      The claim as JSON. Notes that were shortened end with an ellipsis, or are empty if there is no
      room for it. None if the claim is too large even without notes.

    """
    data = encode(claim)
    if len(data) <= limit:
        return data
    notes = claim.notes
    # What the other fields leave for the notes: an empty string of JSON is two bytes.
    room = limit - (len(data) - len(encode(notes)) + 2)
    if room < 0:
        return None
    room -= _ELLIPSIS_BYTES
    shortened = ""
    if room >= 0:
        # How many bytes a character takes in JSON depends on the character: from one to six.
        kept = bisect_right(range(1, room + 1), room, key=lambda end: len(encode(notes[:end])) - 2)
        shortened = notes[:kept] + _ELLIPSIS
    return encode(msgspec.structs.replace(claim, notes=shortened))


class ClaimArrays:
    """Collects claims in JSON arrays of at most ``limit`` bytes, as few as the limit allows."""

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        """How many claims were left out, because they are too large for an array."""
        self._limit = limit
        self._pieces: list[bytes | memoryview] = []
        self._size = 2

    def add(self, claims: Sequence[StatusClaim | LiveClaim]) -> list[bytes]:
        """Add claims, and return the arrays that are full now."""
        if not claims:
            return []
        piece = memoryview(encode(claims))[1:-1]
        if len(piece) + 2 > self._limit:
            if len(claims) > 1:
                middle = len(claims) // 2
                return self.add(claims[:middle]) + self.add(claims[middle:])
            (claim,) = decode_claims(encode(claims))
            shortened = encode_claim(claim, self._limit - 2)
            if shortened is None:
                self.dropped += 1
                return []
            piece = memoryview(shortened)
        full = []
        if self._size + len(piece) > self._limit:
            full.append(self.take())
        self._pieces += (b"," if self._pieces else b"[", piece)
        self._size += len(piece) + 1
        return full

    def take(self) -> bytes:
        """Return the last array, and begin another one; empty bytes if there are no claims."""
        if not self._pieces:
            return b""
        # All at once, because each copy is of up to a megabyte.
        array = b"".join((*self._pieces, b"]"))
        self._pieces.clear()
        self._size = 2
        return array
