"""The guide to observing a program: its programs run, and its table has all metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import trio
import yaml
from blocks import ROOT, blocks, run
from helpers import CLEAN, free_ports, guarded
from prometheus_client import CollectorRegistry

from backbeat_trio.metrics import SessionMetrics

GUIDE: Final = (ROOT / "docs" / "observability.md").read_text()
SERVING, TRACES, LOGS, OWN = blocks(GUIDE, "python")
(CONFIG,) = blocks(GUIDE, "yaml")
# A beat of 0.3 s.
ENV: Final = {"CHORUS_BACKBEAT_NATS_URL": "memory://guide", "CHORUS_BACKBEAT_TEMPO_BPM": "200"}


@guarded(180)
async def test_the_program_with_probes_and_metrics() -> None:
    (port,) = free_ports(1)
    # It should be there for long enough to be asked.
    code = SERVING.replace("0.0.0.0", "127.0.0.1").replace("8080", str(port))
    waiting = code.replace("bb.sleep(2)", "bb.sleep(10_000)")
    assert waiting != code
    answers: dict[str, httpx.Response] = {}
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
        trio.open_nursery() as nursery,
    ):
        process: trio.Process = await nursery.start(
            lambda task_status: trio.run_process(
                [sys.executable, "-W", "error", "-c", waiting],
                check=False,
                env=CLEAN | ENV,
                task_status=task_status,
            )
        )
        while not answers:
            try:
                for path in ("healthz", "readyz", "metrics"):
                    answers[path] = await client.get(f"http://127.0.0.1:{port}/{path}")
            except httpx.TransportError:
                assert process.returncode is None
                await trio.sleep(0.1)
        process.terminate()
    # `backbeat_trio.run` ends so after SIGTERM.
    assert process.returncode == 143
    assert [answer.status_code for answer in answers.values()] == [200, 200, 200]
    assert 'backbeat_operations_started_total{type="search"} 1.0' in answers["metrics"].text


async def test_the_program_with_traces() -> None:
    output = await run(sys.executable, "-W", "error", "-c", TRACES, env=ENV)
    spans = [
        json.loads(text) for text in re.findall(r"^\{.*?^\}", output, re.DOTALL | re.MULTILINE)
    ]
    inner, outer = spans
    assert (inner["name"], outer["name"]) == ("fetch", "search")
    assert inner["parent_id"] == outer["context"]["span_id"]
    assert [event["name"] for event in outer["events"]] == ["started", "executing", "completed"]


async def test_the_program_with_logs() -> None:
    output = await run(sys.executable, "-W", "error", "-c", LOGS, env=ENV)
    lines = [json.loads(line) for line in output.splitlines()]
    (own,) = [line for line in lines if line["text"] == "at work"]
    assert (own["beat"], own["agent"].partition("-")[0]) == (0, "chorus")
    assert 0 <= own["position"] < 1
    assert len(lines) > 1
    assert all(line["agent"] == own["agent"] for line in lines)


async def test_the_program_with_an_instrument() -> None:
    output = await run(sys.executable, "-W", "error", "-c", OWN, env=ENV)
    assert re.search(r"^search took [3-9] beats, and not 1$", output, re.MULTILINE)


def test_the_table_has_all_metrics_with_their_labels() -> None:
    rows = re.findall(r"^\| (`backbeat_.*?) \|(.*?)\|", GUIDE, re.MULTILINE)
    table = {
        name: set(re.findall(r"`(\w+)`", labels))
        for names, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    suffixes = {"counter": "_total", "info": "_info"}
    families: Any = SessionMetrics(CollectorRegistry()).describe()
    described = {
        f"{family.name}{suffixes.get(family.type, '')}": set(family._labelnames)
        for family in families
    }
    described["backbeat_info"] = {"version", "trio", "python"}
    assert table == described


def test_the_configuration_of_prometheus(tmp_path: Path) -> None:
    assert yaml.safe_load(CONFIG)["rule_files"] == ["prometheus-alerts.yml"]
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    shutil.copy(ROOT / "examples" / "prometheus-alerts.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(CONFIG)
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
