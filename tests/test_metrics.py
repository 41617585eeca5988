"""Metrics: their values, their text, and the alerts and the dashboard that use them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
import yaml
from helpers import guarded, until
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

import backbeat_trio
from backbeat_trio import NoResponders, Phase, Request, ServiceError, Session
from backbeat_trio.metrics import LATENESS, USED, SessionMetrics, metrics_of, render
from backbeat_trio.testing import NatsServer, open_session

EXAMPLES: Final = Path(__file__).parent.parent / "examples"
ALERTS: Final = EXAMPLES / "prometheus-alerts.yml"
DASHBOARD: Final = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
PROMTOOL: Final = shutil.which("promtool")
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
# What Prometheus adds to each sample.
SCRAPED: Final = {"instance", "job"}

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples_of(families: Iterable[Metric]) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def look(metrics: SessionMetrics) -> Samples:
    # Not by `render`: virtual time goes on while a thread is waited for.
    return samples_of(parse_text(generate_latest(metrics.registry).decode()))


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"backbeat_{name}", tuple(sorted(labels.items()))))


async def answer(request: Request) -> bytes:
    if request.data == b"wait":
        await trio.sleep_forever()
    if request.data:
        raise ServiceError(404, "nothing here")
    return b"answer"


async def serve(bb: Session, task_status: trio.TaskStatus[None]) -> None:
    async with bb.open_service("s", version="1.0.0") as service:
        await service.serve("s", answer, task_status=task_status)


@asynccontextmanager
async def busy(metrics: SessionMetrics, **settings: Any) -> AsyncGenerator[Session, None]:
    """Run a session in which everything has happened that has metrics."""
    async with (
        open_session(instruments=[metrics], **settings) as bb,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(serve, bb)
        await bb.request("s")
        for payload, beats in ((b"error", None), (b"wait", 1)):
            with pytest.raises((ServiceError, backbeat_trio.BeatBudgetExceeded)):
                await bb.request("s", payload, beats=beats)
        with pytest.raises(NoResponders):
            await bb.request("nobody")
        async with bb.operation("election", beats=10):
            pass
        async with bb.operation("election", beats=2):
            await bb.sleep(3)
        with pytest.raises(ValueError, match="no luck"):
            async with bb.operation("dht_store"):
                raise ValueError("no luck")
        bb.start_operation("election").advance(Phase.EXECUTING)
        bb.start_operation("election")
        yield bb
        nursery.cancel_scope.cancel()


async def test_the_values(autojump_clock: trio.testing.MockClock) -> None:
    metrics = SessionMetrics()
    async with busy(metrics, tempo_bpm=120.0) as bb:
        assert metrics_of(bb) is metrics
        await trio.testing.wait_all_tasks_blocked()
        beat = bb.current_beat()
        seen = look(metrics)
    assert value(seen, "connected") == 1
    assert value(seen, "grid", state="locked") == 1
    assert value(seen, "grid", state="local") == 0
    assert value(seen, "tempo_hertz") == 2
    assert value(seen, "beat_index") == beat
    assert value(seen, "standbys") == 0
    assert value(seen, "reconnects_total") == 0
    assert value(seen, "leader_changes_total") == 0
    assert value(seen, "locks_total") == 1
    assert value(seen, "skew_seconds") == 0
    assert abs(value(seen, "tempo_drift_ratio") or 0.0) < 1e-6
    beats = value(seen, "beats_total")
    assert beats
    assert beats >= 4
    assert value(seen, "beat_lateness_seconds_count") == beats
    assert value(seen, "beat_lateness_seconds_bucket", le="0.0005") == beats
    assert value(seen, "operations", type="election", phase="executing") == 1
    assert value(seen, "operations", type="election", phase="started") == 1
    assert value(seen, "operations_started_total", type="election") == 4
    assert value(seen, "operations_finished_total", type="election", outcome="done") == 2
    assert value(seen, "operations_finished_total", type="dht_store", outcome="failed") == 1
    used = {
        le: value(
            seen,
            "operation_budget_used_ratio_bucket",
            type="election",
            outcome="done",
            le=le,
        )
        for le in ("0.25", "1.0", "1.25", "1.5", "2.0", "+Inf")
    }
    # One took nothing of its 10 beats, the other one 3 of 2.
    assert used == {"0.25": 1, "1.0": 1, "1.25": 1, "1.5": 2, "2.0": 2, "+Inf": 2}
    assert value(seen, "operation_budget_used_ratio_sum", type="election", outcome="done") == 3 / 2
    for side, outcomes in (
        ("client", {"ok": 1, "error": 1, "expired": 1, "no_responders": 1}),
        ("server", {"ok": 1, "error": 1, "expired": 1}),
    ):
        labels = {"side": side, "protocol": "nats"}
        for outcome, number in outcomes.items():
            assert value(seen, "calls_total", outcome=outcome, **labels) == number
        assert value(seen, "call_duration_seconds_count", **labels) == sum(outcomes.values())
        assert value(seen, "call_duration_seconds_bucket", le="0.25", **labels) == number_fast(side)
    assert value(seen, "claims_published_total")
    # Once the session was left, its metrics are those of its end.
    after = look(metrics)
    assert value(after, "operations", type="election", phase="executing") == 0
    assert value(after, "operations_finished_total", type="election", outcome="failed") == 2
    assert value(after, "connected") == 0
    info = {dict(labels)["version"] for name, labels in after if name == "backbeat_info"}
    assert info == {backbeat_trio.__version__}


def number_fast(side: str) -> int:
    # All but the one that waits for its budget of half a second.
    return 3 if side == "client" else 2


async def test_the_next_leader_is_counted(autojump_clock: trio.testing.MockClock) -> None:
    metrics, ending = SessionMetrics(), trio.Event()
    settings: Any = {"nats_url": "memory://metrics", "tempo_bpm": 120.0}

    async def lead(task_status: trio.TaskStatus[None]) -> None:
        async with open_session(agent_id="first", **settings):
            task_status.started()
            await ending.wait()

    async with trio.open_nursery() as nursery:
        await nursery.start(lead)
        async with open_session(instruments=[metrics], **settings):
            await trio.sleep(10)
            assert value(look(metrics), "leader_changes_total") == 0
            ending.set()
            await trio.sleep(10)
            assert value(look(metrics), "leader_changes_total") == 1


async def test_types_are_bounded_and_escaped(autojump_clock: trio.testing.MockClock) -> None:
    hostile = 'a"b\\c\nd\x1b[31m\u202e<b>'
    metrics = SessionMetrics(max_types=3)
    async with open_session(instruments=[metrics]) as bb:
        for type in (hostile, "x" * 1000, "known", *(f"type-{number}" for number in range(500))):
            async with bb.operation(type) as operation:
                operation.advance(Phase.CONNECTING)
        bb.start_operation("type-7")
        for accept, parse in ((None, parse_text), (OPENMETRICS, parse_openmetrics)):
            body, _ = await render(metrics.registry, accept)
            seen = samples_of(parse(body.decode()))
            types = {
                dict(labels)["type"]: number
                for (name, labels), number in seen.items()
                if name == "backbeat_operations_started_total"
            }
            assert types == {hostile: 1, "x" * 100: 1, "known": 1, "other": 501}
            assert value(seen, "operations", type="other", phase="started") == 1
            assert value(seen, "operations", type="other", phase="connecting") == 0
    with pytest.raises(ValueError, match="max_types"):
        SessionMetrics(max_types=0)


async def test_the_format_is_negotiated() -> None:
    metrics = SessionMetrics()
    async with open_session(instruments=[metrics]):
        for accept, wanted in (
            (None, "text/plain; version=0.0.4"),
            ("*/*", "text/plain; version=0.0.4"),
            (f"{OPENMETRICS};q=0.5,text/plain;q=0.2", "application/openmetrics-text"),
            # Of what it does not understand it makes what it likes.
            ("application/openmetrics-text; version=abc", ""),
            ("application/openmetrics-text; version=1.0.0\r\n", "text/plain; version=0.0.4"),
            ("text/plain; version=" + "9" * 10_000, "text/plain"),
        ):
            body, content_type = await render(metrics.registry, accept)
            assert content_type.startswith(wanted), accept
            assert content_type.isprintable()
            assert "abc" not in content_type
            assert body.endswith(b"# EOF\n") == content_type.startswith("application/openmetrics")


class Watched(Collector):
    def __init__(self, registry: Collector) -> None:
        self.registry = registry
        self.threads: list[threading.Thread] = []

    def collect(self) -> Iterator[Metric]:
        self.threads.append(threading.current_thread())
        yield from self.registry.collect()


@guarded(60)
async def test_a_registry_collects_in_any_thread() -> None:
    registry = CollectorRegistry()
    own = Counter("own", "A metric of the application.", registry=registry)
    metrics = SessionMetrics(registry)
    assert samples_of(parse_text((await render(registry))[0].decode())) != {}
    with pytest.raises(ValueError, match="Duplicated"):
        SessionMetrics(registry)
    async with open_session(instruments=[metrics]):
        own.inc()
        watched = Watched(registry)
        body, _ = await render(watched)
        assert trio.lowlevel.in_trio_run()
        assert watched.threads != [threading.current_thread()]
        # As a server of `prometheus_client` does, which knows nothing of Trio.
        found: list[Samples] = []
        thread = threading.Thread(target=lambda: found.append(samples_of(registry.collect())))
        thread.start()
        await until(lambda: found)
        thread.join()
        in_loop = samples_of(registry.collect())
    for samples in (samples_of(parse_text(body.decode())), *found, in_loop):
        assert value(samples, "connected") == 1
        assert samples["own_total", ()] == 1
    thread = threading.Thread(target=lambda: found.append(samples_of(registry.collect())))
    thread.start()
    thread.join()
    assert value(found[-1], "connected") == 0


async def test_each_session_needs_metrics_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    metrics = SessionMetrics()
    async with open_session(instruments=[metrics]) as first:
        async with open_session(instruments=[metrics]) as second:
            assert metrics_of(second) is None
            assert metrics_of(first) is metrics
    assert "each session needs a `SessionMetrics` of its own" in caplog.text


@guarded(120)
async def test_reconnects_and_late_replies_over_nats() -> None:
    metrics = SessionMetrics()
    async with (
        NatsServer() as server,
        open_session(nats_url=server.url, instruments=[metrics], lock_timeout=0.0) as bb,
    ):
        await until(lambda: bb.health().connected)
        transport = bb._runtime.transport
        assert transport is not None
        async with transport.open_subscription("late") as messages:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(bb.request, "late")
                    message = await anext(aiter(messages))
                    scope.cancel()
            transport.publish_nowait(message.reply, b"")
        await until(lambda: bb.statistics().late_replies)
        seen = look(metrics)
        labels = {"side": "client", "protocol": "nats"}
        assert value(seen, "calls_total", outcome="late_reply", **labels) == 1
        assert value(seen, "calls_total", outcome="cancelled_by_caller", **labels) == 1
        assert value(seen, "grid", state="local") == 1
        assert value(seen, "standbys") is None
        server.kill()
        await until(lambda: not bb.health().connected)
        assert value(look(metrics), "connected") == 0
        await server.start()
        await until(lambda: bb.health().connected)
        assert value(look(metrics), "reconnects_total") == 1


# What uses the metrics.


def expressions() -> list[str]:
    """Return all queries: those of the rules, and those of the dashboard as Grafana sends them."""
    rules = yaml.safe_load(ALERTS.read_text())["groups"]
    found = [rule["expr"] for group in rules for rule in group["rules"]]
    for panel in DASHBOARD["panels"]:
        found += [target["expr"] for target in panel.get("targets", ())]
    found = [query.replace("$__rate_interval", "5m").replace("$__range", "1h") for query in found]
    return [re.sub(r"\$(instance|type)\b", ".*", query) for query in found]


def used_by(query: str) -> Iterator[tuple[str, str, str, str]]:
    """Give metric, label, operator and value of all selectors of a query."""
    for name, selectors in re.findall(r"\b(backbeat_\w+)(?:\{([^}]*)\})?", query):
        yield name, "", "", ""
        for label, operator, wanted in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', selectors):
            yield name, label, operator, wanted


@pytest.fixture
async def real(autojump_clock: trio.testing.MockClock) -> bytes:
    metrics = SessionMetrics()
    async with busy(metrics, tempo_bpm=120.0):
        body, _ = await render(metrics.registry)
    return body


async def test_every_query_finds_something_in_real_metrics(real: bytes) -> None:
    labels: dict[str, dict[str, set[str]]] = {}
    for name, pairs in samples_of(parse_text(real.decode())):
        known = labels.setdefault(name, {})
        for label, found in pairs:
            known.setdefault(label, set()).add(found)
    queries = expressions()
    assert len(queries) > 40
    for query in queries:
        names = set()
        for name, label, operator, wanted in used_by(query):
            names.add(name)
            assert name in labels, query
            if not label or label in SCRAPED:
                continue
            assert label in labels[name], query
            # What has not happened in this session is not there.
            possible = labels[name][label] | {"failed", "expired_on_arrival", "late_reply"}
            wanted_values = wanted.split("|") if operator == "=~" else [wanted]
            if wanted != ".*" and operator in ("=", "=~"):
                assert set(wanted_values) <= possible, query
        grouped = re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", query)
        used = {label.strip() for group in grouped for label in group.split(",")}
        assert used <= SCRAPED.union(*(labels[name] for name in names)), query
    # The legends, and the lists to choose from.
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            for legend in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert legend in target["expr"] or legend in SCRAPED, target
    variables = [item for item in DASHBOARD["templating"]["list"] if item["type"] == "query"]
    for variable in variables:
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert label in SCRAPED or label in labels[name]


def promtool(*arguments: str, input: bytes = b"") -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], input=input, capture_output=True, check=False)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    return output


@needs_promtool
async def test_promtool_accepts_the_metrics(real: bytes) -> None:
    assert promtool("check", "metrics", input=real) == ""


@needs_promtool
def test_promtool_accepts_rules_and_queries(tmp_path: Path) -> None:
    promtool("check", "rules", str(ALERTS))
    rules = [{"record": f"q{number}", "expr": query} for number, query in enumerate(expressions())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", str(path))


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    pairs = ", ".join(f'{label}="{text}"' for label, text in labels.items())
    return {"series": f"backbeat_{name}{{{pairs}}}", "values": values}


@needs_promtool
def test_the_alerts_fire_when_they_should(tmp_path: Path) -> None:
    good = {"instance": "good", "job": "good"}
    bad = {"instance": "bad", "job": "bad"}
    of_type = {"type": "election"}
    calls = {"side": "server", "protocol": "nats"}
    ratio = "operation_budget_used_ratio"
    lateness = "beat_lateness_seconds_bucket"
    late = {bound: "0x90" if bound <= 0.1 else "0+60x90" for bound in LATENESS}
    # Each is steady for an hour and a half.
    still = [
        series("connected", "1x90", **good),
        series("connected", "0x90", **bad),
        series("connected", "1x90", instance="alone", job="bad"),
        series("grid", "1x90", state="locked", **good),
        series("grid", "0x90", state="locked", **bad),
        series("grid", "0x90", state="locked", instance="alone", job="bad"),
        *(series(lateness, "0+60x90", le=f"{bound}", **good) for bound in LATENESS),
        *(series(lateness, values, le=f"{bound}", **bad) for bound, values in late.items()),
        series(lateness, "0+60x90", le="+Inf", **good),
        series(lateness, "0+60x90", le="+Inf", **bad),
        series("tempo_drift_ratio", "0.0005x90", **good),
        series("tempo_drift_ratio", "-0.002x90", **bad),
        series("tempo_hertz", "2x90", **good),
        series("tempo_hertz", "2x90", **bad),
        series("uncertainty_seconds", "0.01x90", **good),
        series("uncertainty_seconds", "0.06x90", **bad),
        series("standbys", "1x90", **good),
        series("standbys", "0x90", **bad),
        series("leader_changes_total", "0+0.1x90", **good),
        series("leader_changes_total", "0+1x90", **bad),
        series("reconnects_total", "0+0.1x90", **good),
        series("reconnects_total", "0+1x90", **bad),
        series(f"{ratio}_bucket", "0+95x90", le="1.0", outcome="done", **of_type, **good),
        series(f"{ratio}_count", "0+100x90", outcome="done", **of_type, **good),
        series(f"{ratio}_bucket", "0+80x90", le="1.0", outcome="done", **of_type, **bad),
        series(f"{ratio}_count", "0+100x90", outcome="done", **of_type, **bad),
        series("operations_finished_total", "0+100x90", outcome="done", **of_type, **good),
        series("operations_finished_total", "0+5x90", outcome="failed", **of_type, **good),
        series("operations_finished_total", "0+100x90", outcome="done", **of_type, **bad),
        series("operations_finished_total", "0+25x90", outcome="failed", **of_type, **bad),
        series("calls_total", "0+100x90", outcome="ok", **calls, **good),
        series("calls_total", "0+1x90", outcome="expired_on_arrival", **calls, **good),
        series("calls_total", "0+90x90", outcome="ok", **calls, **bad),
        series("calls_total", "0+10x90", outcome="expired_on_arrival", **calls, **bad),
        # Those of the present beat are not confirmed at any moment.
        series("claims_unconfirmed", "0 5 0 5" + " 0 5" * 43, **good),
        series("claims_unconfirmed", "5x90", **bad),
        series("messages_dropped_total", "0x90", **good),
        series("messages_dropped_total", "0+1x90", **bad),
        series("permission_errors_total", "0x90", **good),
        series("permission_errors_total", "0+1x90", **bad),
    ]
    names = [
        rule["alert"]
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
    ]
    fires = "ALERTS{alertstate='firing'}"
    expected = [
        # Whoever has no connection is not off the beat, too.
        {"labels": f'{{alertname="{name}", instance="{instance}"}}', "value": 1}
        for name, instance in sorted(
            (name, "alone" if name == "BackbeatOffTheBeat" else "bad") for name in names
        )
    ]
    by_job = {
        *("BackbeatNoStandby", "BackbeatLeaderChanges", "BackbeatCallsExpire"),
        *("BackbeatOperationsLate", "BackbeatOperationsFail"),
    }
    for entry in expected:
        name = str(entry["labels"]).split('"')[1]
        if name in by_job:
            entry["labels"] = f'{{alertname="{name}"}}'
    check = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": still,
                "promql_expr_test": [
                    {
                        "expr": f"count by (alertname, instance) ({fires})",
                        "eval_time": "80m",
                        "exp_samples": expected,
                    }
                ],
            }
        ],
    }
    path = tmp_path / "alerts.test.yml"
    path.write_text(yaml.safe_dump(check))
    promtool("test", "rules", str(path))


def test_buckets_go_up_to_twice_the_budget() -> None:
    assert USED[-1] == 2.0
    assert 1.0 in USED
    assert list(USED) == sorted(USED)
