"""Metrics of a session for Prometheus; it needs the extra ``metrics``.

`SessionMetrics` observes a session. `render` makes the answer to a request of ``/metrics``::

    metrics = SessionMetrics()
    async with backbeat.session(instruments=[metrics]) as bb:
        ...
        body, content_type = await render(metrics.registry, request.headers.get("accept"))

`backbeat_trio.serving.serve_health` does the latter by itself. ``docs/observability.md`` lists the
metrics, and ``examples/`` has rules for alerts and a dashboard of Grafana.
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias, final

import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

import backbeat_trio

from ._calls.instrument import Call, Instrument, Observed
from ._checks import check_integer
from ._runtime.health import Health, SessionStatistics
from ._runtime.operations import Operation, Phase
from ._session.session import Session
from ._time.beats import Beat

LATENESS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
"""The buckets of ``backbeat_beat_lateness_seconds``."""
USED: Final = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0)
"""The buckets of ``backbeat_operation_budget_used_ratio``."""
DURATIONS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""The buckets of ``backbeat_call_duration_seconds``."""

_VERSIONS: Final = {
    "version": backbeat_trio.__version__,
    "python": platform.python_version(),
    "trio": trio.__version__,
}
# The longest label that is made of the name of a type, in characters.
_LONGEST: Final = 100
_OTHER: Final = "other"
# A thread that renders holds the interpreter's lock for so many samples. Then it sleeps for so many
# seconds, so that Trio's loop gets it at once. Otherwise the loop would wait for 5 ms each time.
_SLICE: Final = 32
_PAUSE: Final = 20e-6


@final
class _Histogram:
    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> _Histogram:
        copied = _Histogram(self.bounds)
        copied.counts, copied.sum = list(self.counts), self.sum
        return copied

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            buckets.append((str(bound) if bound != float("inf") else "+Inf", float(total)))
        family.add_metric(labels, buckets, self.sum)
        if not len(family.samples) // len(buckets) % 3:
            _let_others_run()


class _Look(NamedTuple):
    # What is known at one moment. It is taken in Trio's loop, and a thread makes text of it.

    health: Health
    statistics: SessionStatistics
    beats: int
    skipped: int
    lateness: _Histogram
    started: dict[str, int]
    live: dict[tuple[str, str], int]
    finished: dict[tuple[str, str], int]
    used: dict[tuple[str, str], _Histogram]
    calls: dict[tuple[str, str, str], int]
    durations: dict[tuple[str, str], _Histogram]


@final
class SessionMetrics(Instrument, Collector):
    """Counts what happens in one session, as a collector of Prometheus.

    Give it to the session by ``session(instruments=[SessionMetrics()])``. Each session needs one of
    its own. The metrics have the prefix ``backbeat_``, base units, and no ids in their labels.

    The methods of `Instrument` and of a collector are for the session and for the registry. A
    registry may collect in any thread: what belongs to Trio is asked for in Trio's loop.

    Args:
      registry: where to register it; None makes a registry of its own.
      max_types: for how many types of operations there are labels, 1 or more. Further ones count
        together, as ``type="other"``, because types may come from outside of the program, and each
        one makes about 40 time series.

    Raises:
      TypeError, ValueError: if ``max_types`` is not valid; from the registry, if it has such
        metrics already.

    """

    def __init__(self, registry: CollectorRegistry | None = None, *, max_types: int = 50) -> None:
        self._max_types = check_integer("max_types", max_types, 1)
        self._session: Observed | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._types: dict[str, str] = {}
        self._beats = self._skipped = 0
        self._lateness = _Histogram(LATENESS)
        self._started: dict[str, int] = {}
        self._live: dict[tuple[str, str], int] = {}
        self._finished: dict[tuple[str, str], int] = {}
        self._used: dict[tuple[str, str], _Histogram] = {}
        self._calls: dict[tuple[str, str, str], int] = {}
        self._durations: dict[tuple[str, str], _Histogram] = {}
        self._since: dict[Call, float] = {}
        self.registry: CollectorRegistry = CollectorRegistry() if registry is None else registry
        """Where it is registered."""
        self.registry.register(self)

    # What the session calls.

    def session_opened(self, session: Observed) -> None:
        """See `Instrument`."""
        if self._token is not None:
            raise RuntimeError("each session needs a `SessionMetrics` of its own")
        self._session, self._token = session, trio.lowlevel.current_trio_token()

    def session_closed(self) -> None:
        """See `Instrument`."""
        # From now on any thread may ask the session.
        self._token = None

    def beat(self, beat: Beat, lateness: float) -> None:
        """See `Instrument`."""
        self._beats += 1 + beat.skipped
        self._skipped += beat.skipped
        self._lateness.observe(lateness)

    def operation_started(self, operation: Operation) -> None:
        """See `Instrument`."""
        type = self._label(operation.type)
        self._started[type] = self._started.get(type, 0) + 1
        self._count_live(type, operation.phase, 1)

    def operation_advanced(self, operation: Operation, former: Phase, beat: int) -> None:
        """See `Instrument`."""
        type = self._label(operation.type)
        self._count_live(type, former, -1)
        self._count_live(type, operation.phase, 1)

    def operation_finished(
        self, operation: Operation, former: Phase, beat: int, reason: str | None
    ) -> None:
        """See `Instrument`."""
        type = self._label(operation.type)
        self._count_live(type, former, -1)
        key = type, "done" if operation.phase is Phase.COMPLETED else "failed"
        self._finished[key] = self._finished.get(key, 0) + 1
        if key not in self._used:
            self._used[key] = _Histogram(USED)
        self._used[key].observe(max(0, beat - operation.start_beat) / operation.beats)

    def call_started(self, call: Call) -> None:
        """See `Instrument`."""
        self._since[call] = trio.current_time()

    def call_finished(self, call: Call) -> None:
        """See `Instrument`."""
        took = trio.current_time() - self._since.pop(call)
        key = call.side, call.protocol, str(call.outcome)
        self._calls[key] = self._calls.get(key, 0) + 1
        side = call.side, call.protocol
        if side not in self._durations:
            self._durations[side] = _Histogram(DURATIONS)
        self._durations[side].observe(took)

    def _label(self, type: str) -> str:
        label = self._types.get(type)
        if label is None:
            if len(self._types) >= self._max_types:
                return _OTHER
            label = self._types[type] = type[:_LONGEST]
        return label

    def _count_live(self, type: str, phase: Phase, number: int) -> None:
        key = type, phase.name.lower()
        self._live[key] = self._live.get(key, 0) + number

    # What a registry calls.

    def describe(self) -> Iterable[Metric]:
        """Return the names of the metrics."""
        return _families(None)

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now."""
        token = self._token
        if self._session is None:
            return
        if token is None or trio.lowlevel.in_trio_run():
            look = self._look()
        else:
            try:
                look = trio.from_thread.run_sync(self._look, trio_token=token)
            except trio.RunFinishedError:
                look = self._look()
        yield from _families(look)

    def _look(self) -> _Look:
        session = self._session
        assert session is not None
        return _Look(
            session.health(),
            session.statistics(),
            self._beats,
            self._skipped,
            self._lateness.copy(),
            dict(self._started),
            dict(self._live),
            dict(self._finished),
            {key: histogram.copy() for key, histogram in self._used.items()},
            dict(self._calls),
            {key: histogram.copy() for key, histogram in self._durations.items()},
        )


def metrics_of(bb: Session) -> SessionMetrics | None:
    """Return the metrics that a session was opened with, or None. Not a checkpoint.

    Args:
      bb: the session.

    """
    for instrument in bb.instruments:
        if isinstance(instrument, SessionMetrics):
            return instrument
    return None


async def render(registry: Collector, accept: str | None = None) -> tuple[bytes, str]:
    """Return the metrics of a registry as text, made in a thread. A checkpoint.

    While the thread works, Trio's loop goes on.

    Args:
      registry: the registry, such as `SessionMetrics.registry`.
      accept: the ``Accept`` header of the request. Prometheus asks for OpenMetrics by it.

    Returns:
      The body of the answer, and its ``Content-Type``.

    """
    if accept is None or not accept.isprintable():
        accept = ""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):
        # The client named a version that is not a number.
        encode, content_type = choose_encoder("")
    limiter = trio.CapacityLimiter(1)
    body = await trio.to_thread.run_sync(
        encode, _Gently(registry), limiter=limiter, abandon_on_cancel=True
    )
    return body, content_type


@final
class _Gently(Collector):
    """A registry that leaves the interpreter's lock to others while it is rendered."""

    def __init__(self, registry: Collector) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = _Slices(family.samples)
            yield family
            _let_others_run()


class _Slices(list[Sample]):
    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(super().__iter__(), 1):
            yield sample
            if not number % _SLICE:
                _let_others_run()


def _let_others_run() -> None:
    if not trio.lowlevel.in_trio_run():
        time.sleep(_PAUSE)


# The families. Those without labels are tables: name, explanation, and value, None if unknown.

_Row: TypeAlias = tuple[str, str, Callable[[_Look], float | None]]

_GAUGES: Final[tuple[_Row, ...]] = (
    ("connected", "Whether there is a connection to the server.", lambda s: s.health.connected),
    (
        "degraded",
        "Whether the beats may differ from those of the cluster.",
        lambda s: s.health.local_degradation,
    ),
    ("errors", "Errors that the health of the session has.", lambda s: len(s.health.errors)),
    ("beat_index", "Index of the present beat.", lambda s: s.health.current_beat),
    (
        "tempo_hertz",
        "Tempo in beats per second, 0 while the grid is paused.",
        lambda s: s.health.current_tempo / 60,
    ),
    ("paused", "Whether the grid is paused.", lambda s: s.health.paused),
    (
        "tempo_drift_ratio",
        "How much faster than announced the beat frames arrive: 0.001 is 0.1 %.",
        lambda s: _drift(s.health),
    ),
    (
        "skew_seconds",
        "How far the position is behind the best estimate of the cluster's.",
        lambda s: s.health.skew,
    ),
    (
        "uncertainty_seconds",
        "How much the position may differ from that of the metronome that leads.",
        lambda s: s.health.uncertainty,
    ),
    (
        "last_frame_age_seconds",
        "How long ago the last valid beat frame arrived.",
        lambda s: s.health.last_frame_age,
    ),
    ("leader_epoch", "Number of the present term of leadership.", lambda s: s.health.epoch),
    ("standbys", "Metronomes that stand by, as the leader says.", lambda s: s.health.standbys),
    (
        "tempo_changes_pending",
        "Changes of the tempo that are still to come.",
        lambda s: len(s.health.pending),
    ),
    (
        "claims_unconfirmed",
        "Terminal claims that were not confirmed yet.",
        lambda s: s.statistics.claims_pending,
    ),
    ("budgets", "Budgets whose blocks are running.", lambda s: s.statistics.live_scopes),
    ("handlers", "Handlers of requests that are running.", lambda s: s.statistics.live_calls),
    (
        "unsent_bytes",
        "Bytes that are to be written to the connection.",
        lambda s: s.statistics.transport and s.statistics.transport.unsent_bytes,
    ),
)

_COUNTERS: Final[tuple[_Row, ...]] = (
    ("beats", "Beats that have passed, with those that the loop has missed.", lambda s: s.beats),
    ("beats_skipped", "Beats that the loop has missed.", lambda s: s.skipped),
    ("reconnects", "New connections after a loss.", lambda s: s.health.reconnect_count),
    ("locks", "Moves to a grid of the cluster.", lambda s: s.statistics.locks),
    (
        "leader_changes",
        "Times that another metronome has begun to lead.",
        lambda s: s.statistics.leader_changes,
    ),
    ("pings", "Pings to the metronome.", lambda s: s.statistics.pings),
    ("pings_failed", "Pings without a valid answer.", lambda s: s.statistics.pings_failed),
    (
        "claims_published",
        "Claims that were published or stored.",
        lambda s: s.statistics.claims_sent,
    ),
    (
        "claims_stored",
        "Terminal claims that a stream has stored.",
        lambda s: s.statistics.claims_stored,
    ),
    (
        "claims_coalesced",
        "Claims that newer ones have replaced before they were sent.",
        lambda s: s.statistics.claims_coalesced,
    ),
    (
        "claims_dropped",
        "Claims that were too large for the server.",
        lambda s: s.statistics.claims_dropped,
    ),
    (
        "claims_undecodable",
        "Claims of others that were not valid.",
        lambda s: s.statistics.claims_undecodable,
    ),
    (
        "operations_soft",
        "Operations that a soft edge has passed.",
        lambda s: s.statistics.operations_soft,
    ),
    (
        "operations_cancelled",
        "Operations that another program has cancelled.",
        lambda s: s.statistics.operations_cancelled,
    ),
    (
        "handlers_stubborn",
        "Handlers that returned although they had been cancelled.",
        lambda s: s.statistics.calls_stubborn,
    ),
    (
        "answers_unsent",
        "Answers to requests that could not be sent.",
        lambda s: s.statistics.calls_unanswered,
    ),
    (
        "messages_received",
        "Messages that arrived for subscriptions.",
        lambda s: s.statistics.transport and s.statistics.transport.received,
    ),
    (
        "messages_dropped",
        "Messages that were dropped because their subscriber was too slow.",
        lambda s: s.statistics.transport and s.statistics.transport.dropped,
    ),
    (
        "permission_errors",
        "Times that the permissions of the server have refused something.",
        lambda s: s.statistics.transport and s.statistics.transport.permission_errors,
    ),
)

_GRIDS: Final = ("locked", "holdover", "local")


def _drift(health: Health) -> float | None:
    if health.measured_bpm is None or not health.current_tempo:
        return None
    return health.measured_bpm / health.current_tempo - 1


def _families(look: _Look | None) -> Iterator[Metric]:
    # With None the families have no samples, and only say what there is.
    info = InfoMetricFamily("backbeat", "Versions of the programs.")
    if look is not None:
        info.add_metric((), _VERSIONS)
    yield info
    for name, text, value in _GAUGES:
        gauge = GaugeMetricFamily(f"backbeat_{name}", text)
        if look is not None and (number := value(look)) is not None:
            gauge.add_metric((), number)
        yield gauge
    for name, text, value in _COUNTERS:
        counter = CounterMetricFamily(f"backbeat_{name}", text)
        if look is not None and (number := value(look)) is not None:
            counter.add_metric((), number)
        yield counter
    yield from _labelled_gauges(look)
    yield from _labelled_counters(look)
    yield from _histograms(look)


def _labelled_gauges(look: _Look | None) -> Iterator[Metric]:
    grid = GaugeMetricFamily(
        "backbeat_grid", "The grid on which the session counts: 1 for one state.", labels=["state"]
    )
    queues = GaugeMetricFamily(
        "backbeat_queue_length", "What waits in the queues of the session.", labels=["queue"]
    )
    live = GaugeMetricFamily(
        "backbeat_operations", "Operations that live now.", labels=["type", "phase"]
    )
    if look is not None:
        statistics = look.statistics
        for state in _GRIDS:
            grid.add_metric((state,), look.health.grid == state)
        queues.add_metric(("claims",), statistics.claims_queued)
        queues.add_metric(("requests",), statistics.waiting_calls)
        if statistics.transport is not None:
            queues.add_metric(("messages",), statistics.transport.waiting)
        for key, number in look.live.items():
            live.add_metric(key, number)
    yield from (grid, queues, live)


def _labelled_counters(look: _Look | None) -> Iterator[Metric]:
    frames = CounterMetricFamily(
        "backbeat_frames", "Beat frames, by what the session made of them.", labels=["result"]
    )
    headers = CounterMetricFamily(
        "backbeat_headers_ignored", "Headers of messages that counted as none.", labels=["reason"]
    )
    started = CounterMetricFamily(
        "backbeat_operations_started", "Operations that were started.", labels=["type"]
    )
    finished = CounterMetricFamily(
        "backbeat_operations_finished", "Operations that have ended.", labels=["type", "outcome"]
    )
    calls = CounterMetricFamily(
        "backbeat_calls",
        "Requests that have ended. An answer that comes when its caller waits no longer is counted "
        "once more, as late_reply.",
        labels=["side", "protocol", "outcome"],
    )
    if look is not None:
        statistics = look.statistics
        for result in ("undecodable", "foreign", "stale_epoch", "repeated", "unexplained"):
            frames.add_metric((result,), getattr(statistics, f"frames_{result}"))
        frames.add_metric(("followed",), statistics.frames)
        headers.add_metric(("garbled",), statistics.headers_garbled)
        headers.add_metric(("absurd",), statistics.headers_absurd)
        for type, number in look.started.items():
            started.add_metric((type,), number)
        for ended, number in look.finished.items():
            finished.add_metric(ended, number)
        for call, number in look.calls.items():
            calls.add_metric(call, number)
        calls.add_metric(("client", "nats", "late_reply"), statistics.late_replies)
    yield from (frames, headers, started, finished, calls)


def _histograms(look: _Look | None) -> Iterator[Metric]:
    lateness = HistogramMetricFamily(
        "backbeat_beat_lateness_seconds", "How long after its beginning a beat was handled."
    )
    used = HistogramMetricFamily(
        "backbeat_operation_budget_used_ratio",
        "Beats that an operation took, divided by its estimate; beyond 1 it was late.",
        labels=["type", "outcome"],
    )
    durations = HistogramMetricFamily(
        "backbeat_call_duration_seconds",
        "How long requests took, or their handlers.",
        labels=["side", "protocol"],
    )
    if look is not None:
        look.lateness.add_to(lateness, ())
        for key, histogram in look.used.items():
            histogram.add_to(used, key)
        for key, histogram in look.durations.items():
            histogram.add_to(durations, key)
    yield from (lateness, used, durations)
