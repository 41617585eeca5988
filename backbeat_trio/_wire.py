"""The wire contract, version 1: structs, subjects and codecs.

Every message is JSON and carries ``type``. Unknown fields are ignored, so that a later version may
add some; a message that does not decode raises `msgspec.DecodeError` here and is counted and
dropped by whoever received it.
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

# Bounds are part of the types: an integer that a float cannot hold exactly would make positions
# differ between agents, and an unbounded one is a way to stall the arithmetic.
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

ClaimState: TypeAlias = Literal["executing", "done", "failed", "waiting"]
BeatPhase: TypeAlias = Literal["downbeat", "upbeat"]
Role: TypeAlias = Literal["leader", "standby", "agent"]

HEALTH_TASK_ID: Final = "chorus-p2p-health"

_ELLIPSIS: Final = "\N{HORIZONTAL ELLIPSIS}"
_ELLIPSIS_BYTES: Final = len(_ELLIPSIS.encode())

MAX_TOKEN: Final = 128
TOKEN: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_TOKEN}}}", re.ASCII)


class Segment(Struct, frozen=True, gc=False):
    """A straight piece of the grid: from ``beat0`` on, one tempo.

    ``t0_ns`` is the cluster time of ``beat0`` in nanoseconds, ``milli_bpm`` the tempo in
    thousandths of a beat a minute; 0 is a grid that stands still on ``beat0``.
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
    """What the metronome's leader publishes once a beat."""

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
    """The grid's identity: two grids of one cluster have different ones."""
    alone: bool | UnsetType = UNSET
    """True where the leader has no record, so that anybody who has one outranks it."""
    contested: ContestedIds | UnsetType = UNSET
    """Ids that more than one process has used lately: whoever has one of them pings at once."""

    def __post_init__(self) -> None:
        if self.segment.beat0 > self.beat_index:
            raise ValueError("`segment.beat0` lies behind `beat_index`")
        if not self.segment.milli_bpm and self.beat_index != self.segment.beat0:
            raise ValueError("`beat_index` is not that on which the grid stands still")


class StatusClaim(Struct, frozen=True, gc=False, tag_field="type", tag="backbeat.statusclaim.v1"):
    """A status message of one operation, or of an agent's health.

    The fields after `notes` are optional. Agents of earlier versions leave them out, and a claim of
    an agent's health has `cluster_id` only. A field that a claim does not have is `msgspec.UNSET`,
    which is false, so ``claim.operation_type or ""`` is always a string.
    """

    agent_id: str
    """The agent that published the claim."""
    task_id: str
    """The id of the operation; ``"chorus-p2p-health"`` in a claim of the agent's health."""
    beat_index: int
    """The index of the beat on which the claim was made."""
    state: ClaimState
    """``"executing"``, ``"done"``, ``"failed"`` or ``"waiting"``."""
    beats_left: int
    """How many beats of the estimate are left, 0 or more."""
    progress: float
    """How much of the estimate has passed, from 0.0 to 1.0; 0.0 after a failure."""
    notes: str
    """The same for people to read, and the reason of a failure."""
    cluster_id: str | UnsetType = UNSET
    """The cluster whose beats the claim counts."""
    operation_type: str | UnsetType = UNSET
    """The type of the operation, such as ``"election"``."""
    phase: str | UnsetType = UNSET
    """The phase of the operation in lower case, from ``"started"`` to ``"completed"``, or
    ``"failed"``. Later versions may add phases."""
    peers: int | UnsetType = UNSET
    """How many peers take part in the operation."""
    estimated_beats: int | UnsetType = UNSET
    """How many beats the operation was expected to take when it started."""
    parent: str | UnsetType = UNSET
    """The operation inside of which this one was opened, as ``"<agent id>/<operation id>"``."""
    correlation_id: str | UnsetType = UNSET
    """The outermost of the operations around this one, in the same form. An operation without a
    parent does not say it, because it would name itself."""
    soft: bool | UnsetType = UNSET
    """True from when the operation should wind down. Otherwise it is absent."""


class LiveClaim(Struct, frozen=True, gc=False, tag_field="type", tag="backbeat.statusclaim.v1"):
    """A `StatusClaim` of a live operation, with all that stays the same between beats encoded.

    Encoding it gives the same bytes as the `StatusClaim`, in less time.
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
    agent_id: str
    role: Identity | UnsetType = UNSET
    """What the one who asks is, a `Role`, where it is no agent. One that is unknown is no error."""
    process: Identity | UnsetType = UNSET
    """A name of the process that no other one has, if its agent must be the only one of its id."""


class SyncReply(Struct, frozen=True, tag_field="type", tag="backbeat.sync.v1"):
    """The leader's answer: the grid, and when the ping came and the answer left in cluster time."""

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
    """What the leader's cluster time may differ by from that of the grid's first leader."""
    standbys: Index | UnsetType = UNSET
    """How many metronomes stand by, as far as the leader has heard of them."""
    wait_ns: Wait | UnsetType = UNSET
    """How long to wait before the next ping, where the leader is asked too often."""
    shared_id: bool | UnsetType = UNSET
    """True if another live process pings as the same agent."""


class RecallRequest(Struct, frozen=True, tag_field="type", tag="backbeat.recall.v1"):
    """A question of a metronome that finds no leader, to everybody who remembers the grid."""

    cluster_id: str
    leader_id: str


class RecallReply(Struct, frozen=True, tag_field="type", tag="backbeat.recall.v1"):
    """The answer of whoever is locked to the grid: what it is, and what time it is."""

    cluster_id: str
    agent_id: str
    role: Role
    epoch: Index
    received_ns: Nanoseconds
    """The cluster time at which the request came."""
    sent_ns: Nanoseconds
    """The cluster time at which the answer left."""
    uncertainty_ns: Uncertainty
    """What these may be wrong by."""
    last_beat: Annotated[int, Meta(ge=-1, le=MAX_INDEX)]
    """The last beat that was delivered."""
    beats_per_bar: BeatsPerBar
    segment: Segment
    next_segment: Segment | None = None
    later_segments: LaterSegments | UnsetType = UNSET
    incarnation: Identity | UnsetType = UNSET
    alone: bool | UnsetType = UNSET


class TempoRequest(Struct, frozen=True, tag_field="type", tag="backbeat.tempo.v1"):
    """An operator's request; ``at_beat`` None means the next downbeat that can be kept.

    ``tempo_bpm`` 0 has the grid stand still, and None has it go on at the tempo of before.
    ``over_beats`` spreads the change over so many beats.
    """

    cluster_id: str
    tempo_bpm: float | None
    at_beat: Index | None = None
    over_beats: Index | UnsetType = UNSET


class TempoReply(Struct, frozen=True, tag_field="type", tag="backbeat.tempo.v1"):
    """The leader's answer: the segment that was committed, or the reason for which none was."""

    cluster_id: str
    ok: bool
    error: str | None = None
    epoch: Index | None = None
    effective_beat: Index | None = None
    segment: Segment | None = None


class Probe(Struct, frozen=True, tag_field="type", tag="backbeat.lead.v1"):
    """A question whether the leader of an epoch lives, and its answer."""

    cluster_id: str
    epoch: Index
    leader_id: str


class Record(Struct, frozen=True, tag_field="type", tag="backbeat.metronome.v1"):
    """What metronomes keep of the grid, so that the next one goes on with it."""

    cluster_id: str
    incarnation: str
    epoch: Index
    nonce: str
    leader_id: str
    beats_per_bar: BeatsPerBar
    segments: Annotated[tuple[Segment, ...], Meta(min_length=1)]
    high_water: Annotated[int, Meta(ge=-1, le=MAX_INDEX // 2)]
    milli_bpm: Annotated[int, Meta(ge=MIN_MILLI_BPM, le=MAX_MILLI_BPM)]
    """The tempo at which a grid that stands still goes on."""
    announced_seq: Annotated[int, Meta(ge=-1, le=MAX_INDEX)] = msgspec.field(
        default=MAX_INDEX, name="told_seq"
    )
    """The last segment that a frame or an answer has announced; by default all of them were."""
    written_ms: Milliseconds | None = None
    """When it was written by the wall clock of who wrote it, for where nothing else is left."""
    written_ns: Nanoseconds | None = None
    """The cluster time at which it was written."""


class _Other(Struct, tag_field="type", tag=""):
    # A second member makes a tagged union of each decoder's type: only then does msgspec insist
    # that `type` is there at all.
    pass


T = TypeVar("T", bound=Struct)

encode: Final[Callable[[Any], bytes]] = msgspec.json.Encoder().encode


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    # These two come from the depths of the decoder as they are.
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


# Each raises `msgspec.DecodeError` for what is not such a message.
decode_frame: Final = _decoder(BeatFrame)
decode_sync_request: Final = _decoder(SyncRequest)
decode_sync_reply: Final = _decoder(SyncReply)
decode_tempo_request: Final = _decoder(TempoRequest)
decode_tempo_reply: Final = _decoder(TempoReply)
decode_probe: Final = _decoder(Probe)
decode_recall_request: Final = _decoder(RecallRequest)
decode_recall_reply: Final = _decoder(RecallReply)
decode_record: Final = _decoder(Record)
_decode_claim: Final = _decoder(StatusClaim)
_claim_arrays: Final = msgspec.json.Decoder(list[StatusClaim | _Other])


def decode_claims(data: bytes) -> list[StatusClaim]:
    """Decode one claim, or an array of them; raise `msgspec.DecodeError` where it is neither."""
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


def lead_subject(cluster_id: str, epoch: int) -> str:
    """Return the subject on which the leader of an epoch answers probes."""
    return f"backbeat.lead.{cluster_id}.{epoch}"


def recall_subject(cluster_id: str) -> str:
    """Return the subject on which whoever is locked answers who remembers the grid."""
    return f"backbeat.recall.{cluster_id}"


def bucket_of(cluster_id: str) -> str:
    """Return the name of the JetStream key-value bucket in which metronomes keep the grid."""
    return f"backbeat-{cluster_id}"


def is_token(text: str) -> bool:
    """Tell whether ``text`` may stand as one token of a subject."""
    return TOKEN.fullmatch(text) is not None


def is_inbox(reply: str) -> bool:
    """Tell whether a subject is one on which an answer may be published.

    Servers check who publishes on a subject, and not who asks for an answer on it. Whoever may ask
    could otherwise have another one publish where only that one may.
    """
    return bool(reply) and not reply.startswith(("backbeat.", "$"))


def window_id(index: int, beats_per_bar: int) -> str:
    """Return the name of the window (the bar) that a beat lies in."""
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
    """Encode one claim in at most ``limit`` bytes, and shorten its notes where they are too long.

    Returns:
      The claim as JSON. Notes that were shortened end with an ellipsis, or are empty where there is
      no room for that either. None where the claim is too large even without notes.

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
    """Gather claims into JSON arrays of at most ``limit`` bytes, as few as the limit allows."""

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        """How many claims were left out, because they do not fit into any array."""
        self._limit = limit
        self._pieces: list[bytes | memoryview] = []
        self._size = 2

    def add(self, claims: Sequence[StatusClaim | LiveClaim]) -> list[bytes]:
        """Take in some claims, and return the arrays that became full by it."""
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
        """Return what has been gathered and begin anew; empty bytes where nothing was."""
        if not self._pieces:
            return b""
        # In one go, as it is up to a megabyte that would be copied.
        array = b"".join((*self._pieces, b"]"))
        self._pieces.clear()
        self._size = 2
        return array
