"""What ``backbeat check`` measures, the limits of each measure, and the verdict. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

# A process is late by more than max(5 ms, 1/10 beat), and a position or a tempo is wrong by more
# than max(2 ms, 1/100 beat) or 0.1 %: the same limits as those of `Health`. Ten times that is
# critical.
_LATE: Final = (0.005, 0.1)
_OFF: Final = (0.002, 0.01)
_DRIFT: Final = 0.001
_CRITICAL: Final = 10


class Status(enum.IntEnum):
    """A verdict; its number is the exit status that monitoring systems expect."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


# What is known to be broken counts before what could not be measured, and this before a warning,
# as a warning might be all that hides a worse state.
_SEVERITY: Final = (Status.OK, Status.WARNING, Status.UNKNOWN, Status.CRITICAL)


class Kind(NamedTuple):
    """A kind of measure.

    Attributes:
      unit: ``"s"`` for seconds, ``"ratio"``, or an empty string for a number of things.
      metric: the name of its metric of Prometheus, without the prefix.
      help: what it is, in a few words.
      least: whether a limit is the least good value; otherwise it is the greatest one.

    """

    unit: str
    metric: str
    help: str
    least: bool = False


KINDS: Final[Mapping[str, Kind]] = {
    "leader": Kind("", "leader", "Whether a metronome leads.", least=True),
    "standbys": Kind("", "standbys", "Metronomes that stand by.", least=True),
    "drift": Kind("ratio", "drift_ratio", "How far the tempo of the frames is off."),
    "uncertainty": Kind("s", "uncertainty_seconds", "By how much the position may be wrong."),
    "lateness": Kind("s", "lateness_seconds", "How late this process handled a beat."),
    "agents": Kind("", "agents", "Agents that were heard or found.", least=True),
    "late": Kind("", "late_operations", "Live operations past their budget."),
    "slow": Kind("", "slow_operations", "Live operations past their soft edge."),
    "silent": Kind("", "silent_operations", "Live operations without a claim for three beats."),
}


class Measure(msgspec.Struct, frozen=True):
    """One measure, and the verdict on it.

    Attributes:
      name: one of `KINDS`.
      value: what was measured; None if it could not be.
      unit: as in `Kind`.
      warn: the limit beyond which it is a warning; None if there is none.
      critical: the limit beyond which it is critical; None if there is none.
      status: ``"ok"``, ``"warning"``, ``"critical"`` or ``"unknown"``.
      text: the value for people, or why it could not be measured.

    """

    name: str
    value: float | None
    unit: str
    warn: float | None
    critical: float | None
    status: str
    text: str


class Report(msgspec.Struct, frozen=True):
    """The verdict on a cluster.

    Attributes:
      status: the worst status of the measures: ``"critical"`` counts before ``"unknown"``, and that
        before ``"warning"``.
      exit_code: the exit status: 0, 1, 2 or 3.
      cluster_id: the cluster.
      text: the reasons, in one line.
      measures: what was measured.

    """

    status: str
    exit_code: int
    cluster_id: str
    text: str
    measures: tuple[Measure, ...]


class Found(NamedTuple):
    """What was measured of one kind: a value, or why there is none.

    Attributes:
      value: in the unit of its kind; None if it could not be measured.
      text: what it means for people; by default the value itself.
      denied: whether it should have been measured and could not be. A value that is only not there
        yet is no trouble, unless somebody has set a limit for it.
      verdict: the verdict if nobody has set a limit; None leaves it to the default limits.

    """

    value: float | None
    text: str = ""
    denied: bool = False
    verdict: Status | None = None


class Limits(NamedTuple):
    """The limits of all kinds, by their names; a kind without a limit has none."""

    warn: Mapping[str, float]
    critical: Mapping[str, float]


def default_limits(beat_seconds: float) -> Limits:
    """Return the limits that hold if nobody has set others.

    Args:
      beat_seconds: the length of a beat, in seconds; 0.0 while the grid is paused.

    """
    late = max(_LATE[0], _LATE[1] * beat_seconds)
    off = max(_OFF[0], _OFF[1] * beat_seconds)
    warn = {"standbys": 1.0, "drift": _DRIFT, "uncertainty": off, "lateness": late}
    critical = {name: _CRITICAL * limit for name, limit in warn.items() if name != "standbys"}
    return Limits(warn | {"late": 0.0, "silent": 0.0}, critical | {"leader": 1.0})


def judge(
    cluster_id: str, found: Mapping[str, Found], limits: Limits, asked: Limits, summary: str
) -> Report:
    """Return the verdict on what was found.

    Args:
      cluster_id: the cluster.
      found: what was measured, by the names of the kinds.
      limits: the limits that hold by default.
      asked: the limits that somebody has set. They take the place of the others.
      summary: what to say if all is well.

    """
    measures = tuple(
        _judge(name, found[name], _joined(limits, asked, name), asked)
        for name in KINDS
        if name in found
    )
    worst = max((Status[each.status.upper()] for each in measures), key=_SEVERITY.index)
    reasons = [
        each.text
        for status in reversed(_SEVERITY[1:])
        for each in measures
        if each.status == status.name.lower()
    ]
    return _report(worst, cluster_id, "; ".join(reasons) or summary, measures)


def unknown(cluster_id: str, why: str) -> Report:
    """Return the verdict if nothing could be measured."""
    return _report(Status.UNKNOWN, cluster_id, why, ())


def _report(status: Status, cluster_id: str, text: str, measures: tuple[Measure, ...]) -> Report:
    return Report(status.name.lower(), int(status), cluster_id, text, measures)


def _joined(limits: Limits, asked: Limits, name: str) -> tuple[float | None, float | None]:
    warn = asked.warn.get(name, limits.warn.get(name))
    critical = asked.critical.get(name, limits.critical.get(name))
    return warn, critical


def _judge(
    name: str, found: Found, limits: tuple[float | None, float | None], asked: Limits
) -> Measure:
    kind, (warn, critical), value = KINDS[name], limits, found.value
    is_asked = name in asked.warn or name in asked.critical
    if value is None:
        status = Status.UNKNOWN if found.denied or is_asked else Status.OK
    elif found.verdict is not None and not is_asked:
        status = found.verdict
    elif _is_beyond(kind, value, critical):
        status = Status.CRITICAL
    elif _is_beyond(kind, value, warn):
        status = Status.WARNING
    else:
        status = Status.OK
    text = found.text or f"{name} {format_value(kind, value)}"
    limit = critical if status is Status.CRITICAL else warn
    if value is not None and status is not Status.OK and _is_beyond(kind, value, limit):
        bound = "at least" if kind.least else "at most"
        text += f" (should be {bound} {format_value(kind, limit)})"
    return Measure(name, value, kind.unit, warn, critical, status.name.lower(), text)


def _is_beyond(kind: Kind, value: float, limit: float | None) -> bool:
    if limit is None:
        return False
    return value < limit if kind.least else value > limit


def format_value(kind: Kind, value: float | None) -> str:
    """Write a value in its unit, for people."""
    if value is None:
        return "unknown"
    if kind.unit == "ratio":
        return f"{value:.3g}".rstrip() if not value else f"{100 * value:.3g} %"
    if kind.unit == "s":
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:g}"


# The formats for monitoring systems.


def format_nagios(report: Report) -> str:
    """Write a report as the plug-ins of Nagios and Icinga do, with performance data."""
    first = _plain(f"BACKBEAT {report.status.upper()} - {report.text}")
    data = " ".join(_perfdata(each) for each in report.measures if each.value is not None)
    details = [_plain(f"{each.status}: {each.text}") for each in report.measures]
    return "\n".join([f"{first} | {data}" if data else first, *details]) + "\n"


def _plain(text: str) -> str:
    # A vertical bar begins the performance data.
    return text.replace("|", "/").replace("\n", " ")


def _perfdata(measure: Measure) -> str:
    kind = KINDS[measure.name]
    unit, factor = {"ratio": ("%", 100.0), "s": ("s", 1.0), "": ("", 1.0)}[kind.unit]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value * factor:.9f}".rstrip("0").rstrip(".")

    # A range that ends with a colon has no upper bound.
    bounds = (
        f"{number(limit)}:" if kind.least and limit is not None else number(limit)
        for limit in (measure.warn, measure.critical)
    )
    return f"{measure.name}={number(measure.value)}{unit};{';'.join(bounds)};0"


def format_prometheus(report: Report) -> str:
    """Write a report as metrics, for a file that the node exporter of Prometheus collects."""
    cluster = f'cluster="{report.cluster_id}"'
    states = [
        (f'{cluster},measure="{each.name}"', Status[each.status.upper()].value)
        for each in report.measures
    ]
    return "".join(
        [
            _metric(
                "status", "0 ok, 1 warning, 2 critical, 3 unknown.", [(cluster, report.exit_code)]
            ),
            _metric("measure_status", "The same for each measure.", states),
            *(
                _metric(KINDS[each.name].metric, KINDS[each.name].help, [(cluster, each.value)])
                for each in report.measures
                if each.value is not None
            ),
        ]
    )


def _metric(name: str, text: str, samples: Sequence[tuple[str, float]]) -> str:
    if not samples:
        return ""
    full = f"backbeat_check_{name}"
    lines = [f"# HELP {full} {text}", f"# TYPE {full} gauge"]
    lines += [f"{full}{{{labels}}} {value:.12g}" for labels, value in samples]
    return "\n".join(lines) + "\n"
