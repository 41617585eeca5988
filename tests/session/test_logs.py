"""Beat and position in log records, in the session's own and in those of a program."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from backbeat_trio import BeatFilter, use_session
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def attributes(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name.startswith("backbeat_")}


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Keep the records of two loggers, of which only one has a filter."""
    handler, loggers = Kept(), [logging.getLogger("app"), logging.getLogger("backbeat_trio")]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def nothing() -> dict[str, Any]:
    return dict.fromkeys(f"backbeat_{name}" for name in ("beat", "position", "cluster", "agent"))


async def test_records_of_the_session(kept: Kept, autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        await bb.sleep(2.5)
        bb._runtime.logger.warning("something of %s", "the session")
    ids = {"backbeat_cluster": "test-cluster", "backbeat_agent": "test-agent"}
    assert kept.records
    for record in kept.records:
        seen = attributes(record)
        assert seen.items() >= ids.items(), record
        assert set(seen) == set(nothing())
    by_text = {record.getMessage().partition(" - ")[0]: record for record in kept.records}
    record = by_text["something of the session"]
    assert attributes(record) == {"backbeat_beat": 2, "backbeat_position": 2.5} | ids
    # The line that logs is that of the caller, and not of an adapter.
    assert record.filename == "test_logs.py"
    beats = [record for record in kept.records if "beat received" in record.getMessage()]
    assert [record.__dict__["backbeat_beat"] for record in beats[:2]] == [1, 2]


async def test_the_filter_adds_the_same_to_own_records(kept: Kept, autojump_clock: Clock) -> None:
    app = logging.getLogger("app.part")
    kept.addFilter(BeatFilter())
    ids = {"backbeat_cluster": "test-cluster", "backbeat_agent": "test-agent"}

    def seen(logger: logging.Logger = app) -> dict[str, Any]:
        logger.info("own")
        return attributes(kept.records[-1])

    assert seen() == nothing()
    async with open_session(tempo_bpm=60.0) as bb:
        await bb.sleep(3.25)
        assert seen() == {"backbeat_beat": 3, "backbeat_position": 3.25} | ids
        async with open_session(agent_id="other") as other:
            assert seen()["backbeat_agent"] == "other"
            with use_session(bb):
                assert seen()["backbeat_agent"] == "test-agent"
        # A thread cannot read Trio's clock.
        in_thread = await trio.to_thread.run_sync(seen)
        assert in_thread["backbeat_beat"] >= 3
        assert in_thread == in_thread | {"backbeat_position": None} | ids
        # An explicit one stays.
        app.info("own", extra={"backbeat_beat": -1})
        assert attributes(kept.records[-1]) == {"backbeat_beat": -1}
        assert other.config.agent_id == "other"
    assert seen() == nothing()


async def test_a_format_with_the_beat_never_fails(kept: Kept, autojump_clock: Clock) -> None:
    formatter = logging.Formatter("%(message)s beat=%(backbeat_beat)s")
    kept.addFilter(BeatFilter("app"))
    logging.getLogger("app").info("one")
    async with open_session(tempo_bpm=60.0) as bb:
        logging.getLogger("app").info("two")
        await bb.sleep(1)
    logging.getLogger("backbeat_trio.other").info("three")
    texts = [formatter.format(record) for record in kept.records[:-1]]
    assert texts[0] == "one beat=None"
    assert "two beat=0" in texts
    # The filter is for `app` only.
    assert attributes(kept.records[-1]) == {}


async def test_other_loggers_are_used_as_they_are() -> None:
    class Plain:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def info(self, msg: object, *args: object) -> None:
            self.texts.append(str(msg) % args)

        debug = warning = error = info

    plain = Plain()
    async with open_session(logger=plain) as bb:
        assert bb._runtime.logger is plain
    assert any("integration started" in text for text in plain.texts)
