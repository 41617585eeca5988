"""What the headers of a message say, and what is said of those that are not valid."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import given, strategies as st

from backbeat_trio._calls.headers import (
    MAX_LEFT,
    Carried,
    Deadline,
    ParentOperation,
    normalized,
    parse,
    resolve,
    write,
)
from backbeat_trio._transport.headers import decode_headers

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ALL = Carried(
    Deadline("3f2a", 12345.25, 4.75),
    Deadline("3f2a", 12343.0, 2.5),
    ParentOperation("chorus-production", "agent-42", "election 7; 100%", "agent-7/root"),
    TRACE,
)
WRITTEN = {
    "Backbeat-Deadline": "3f2a; 12345.250; 4.750",
    "Backbeat-Soft-Deadline": "3f2a; 12343.000; 2.500",
    "Backbeat-Operation": "chorus-production; agent-42; election%207%3B%20100%25; agent-7/root",
    "traceparent": TRACE,
}


def test_headers_to_the_letter() -> None:
    assert write(ALL) == WRITTEN
    assert parse(WRITTEN) == (ALL, [])


def test_no_headers_say_nothing() -> None:
    assert write(Carried()) == {}
    assert parse({}) == parse([]) == parse({"Content-Type": "text/plain"}) == (Carried(), [])


@pytest.mark.parametrize(
    "headers",
    [
        {name.lower(): value for name, value in WRITTEN.items()},
        {name.upper(): value for name, value in WRITTEN.items()},
        {name: [value] for name, value in WRITTEN.items()},
        {name: [value, f" {value} "] for name, value in WRITTEN.items()},
        list(WRITTEN.items()),
        [*WRITTEN.items(), *((name.lower(), value) for name, value in WRITTEN.items())],
        [(name.lower().encode(), value.encode()) for name, value in WRITTEN.items()],
        {name: value.replace("; ", ";") for name, value in WRITTEN.items()},
        {"X-Other": "1" * 1_000_000, **WRITTEN},
    ],
    ids=["lower", "upper", "lists", "twice", "pairs", "both", "bytes", "no spaces", "1 MB beside"],
)
def test_spellings_that_say_the_same(headers: Any) -> None:
    assert parse(headers) == (ALL, [])


positions = st.floats(0, 2**53)
lefts = st.floats(0, MAX_LEFT)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=1000)
tokens = st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True)
hexes = st.text("0123456789abcdef", min_size=1, max_size=32)


@given(hexes, positions, lefts)
def test_a_deadline_comes_back_as_it_was_written(
    incarnation: str, beat: float, left: float
) -> None:
    headers = write(Carried(Deadline(incarnation, beat, left)))
    carried, problems = parse(headers)
    assert not problems
    assert carried.deadline is not None
    assert carried.deadline.incarnation == incarnation
    assert carried.deadline.beat == pytest.approx(beat, abs=0.0005, rel=0)
    assert carried.deadline.beat == beat or beat < 0.001
    assert carried.deadline.left == pytest.approx(left, abs=0.0005, rel=1e-15)
    # A second hop changes nothing more.
    assert write(carried) == headers


@given(tokens, tokens, names, names)
def test_an_operation_comes_back_as_it_was_written(
    cluster_id: str, agent_id: str, name: str, correlation_id: str
) -> None:
    operation = ParentOperation(cluster_id, agent_id, name, correlation_id)
    headers = write(Carried(operation=operation))
    assert all(" " <= character <= "~" for character in headers["Backbeat-Operation"])
    if not (name.strip() and correlation_id.strip()):
        return
    assert parse(headers) == (Carried(operation=operation), [])


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("3f2a; nan; 4", "garbled"),
        ("3f2a; 12; NaN", "garbled"),
        ("3f2a; inf; 4", "garbled"),
        ("3f2a; 12; infinity", "garbled"),
        ("3f2a; -12; 4", "garbled"),
        ("3f2a; 12; -4", "garbled"),
        ("3f2a; +12; 4", "garbled"),
        ("3f2a; 1_2; 4", "garbled"),
        ("3f2a; 0x12; 4", "garbled"),
        ("3f2a; \N{ARABIC-INDIC DIGIT ONE}; 4", "garbled"),
        ("3f2a; 12", "garbled"),
        ("3f2a; 12; 4; 5", "garbled"),
        ("; 12; 4", "garbled"),
        ("12; 4", "garbled"),
        ("", "garbled"),
        ("3f2a; ; ", "garbled"),
        ("3" * 129 + "; 12; 4", "garbled"),
        ("%ff; 12; 4", "garbled"),
        ("\ud800; 12; 4", "garbled"),
        ("3f2a; 12; 4" * 100_000, "garbled"),
        ("3f2a; 1e300; 4", "absurd"),
        ("3f2a; 1e999; 4", "absurd"),
        ("3f2a; " + "9" * 400 + "; 4", "absurd"),
        ("3f2a; 9007199254740994; 4", "absurd"),
        ("3f2a; 12; 1e300", "absurd"),
        ("3f2a; 12; 1000000001", "absurd"),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("name", ["Backbeat-Deadline", "backbeat-soft-deadline"])
def test_a_deadline_that_is_not_valid_counts_as_none(name: str, value: str, kind: str) -> None:
    carried, problems = parse({name: value, "traceparent": TRACE})
    assert carried == Carried(traceparent=TRACE)
    assert [(problem.kind, problem.header.lower()) for problem in problems] == [
        (kind, name.lower())
    ]
    assert problems[0].text


@pytest.mark.parametrize(
    "headers",
    [
        [("Backbeat-Deadline", "a; 1; 1"), ("Backbeat-Deadline", "a; 2; 2")],
        [("Backbeat-Deadline", "a; 1; 1"), ("backbeat-deadline", "a; 2; 2")],
        [("Backbeat-Deadline", "a; 1; 1"), ("X", "y"), ("BACKBEAT-DEADLINE", "a; 1; 1.0")],
        {"Backbeat-Deadline": ["a; 1; 1", "a; 2; 2", "a; 1; 1"]},
    ],
)
def test_two_different_values_count_as_none(headers: Any) -> None:
    carried, problems = parse(headers)
    assert carried == Carried()
    assert [problem.kind for problem in problems] == ["garbled"]
    assert "more than once" in problems[0].text


@pytest.mark.parametrize("name", list(WRITTEN))
def test_two_lines_of_a_message_with_different_values_count_as_none(name: str) -> None:
    for other in (name, name.upper()):
        lines = f"NATS/1.0\r\n{name}: {WRITTEN[name]}\r\n{other}: {WRITTEN[name][:-1]}2\r\n\r\n"
        carried, problems = parse(decode_headers(lines.encode())[1])
        assert carried == Carried()
        assert [problem.kind for problem in problems] == ["garbled"]


def test_megabytes_of_one_name_are_read_in_no_time() -> None:
    values = [f"{number:x}" for number in range(400_000)]
    block = "\r\n".join(["NATS/1.0", *(f"a:{value}" for value in values), "", ""]).encode()
    joined = {"a": ", ".join(values)}
    begin = time.perf_counter()
    assert decode_headers(block) == ("", joined)
    assert normalized([("A", value) for value in values]) == joined
    # If each value were joined to the earlier ones, this would take minutes.
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize(
    "value",
    [
        "",
        "c; a; id",
        "c; a; id; root; more",
        "c c; a; id; root",
        "c; a.b; id; root",
        "c; a; ; root",
        "c; a; id; ",
        "c; a; %ff; root",
        "c; a; id; \udcff",
        "c; a; " + "x" * 1001 + "; root",
        "c; a; id; " + "x" * 1200,
        "c; a; id; " + "x" * 1_000_000,
    ],
    ids=lambda text: text[:20],
)
def test_an_operation_that_is_not_valid_counts_as_none(value: str) -> None:
    carried, problems = parse({"Backbeat-Operation": value})
    assert carried == Carried()
    assert [problem.kind for problem in problems] == ["garbled"]


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (TRACE, True),
        (TRACE[:-2] + "00", True),
        ("cc" + TRACE[2:] + "-later-fields", True),
        (TRACE + "-later-fields", False),
        ("ff" + TRACE[2:], False),
        (TRACE.upper(), False),
        (TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32), False),
        (TRACE.replace("00f067aa0ba902b7", "0" * 16), False),
        (TRACE[:-1], False),
        ("cc" + TRACE[2:] + "later", False),
        ("cc" + TRACE[2:] + "-\r\nX-Other: 1", False),
        ("cc" + TRACE[2:] + "-" + "x" * 1000, False),
    ],
)
def test_a_trace_is_passed_on_if_it_is_valid(value: str, valid: bool) -> None:
    carried, problems = parse({"Traceparent": value})
    assert carried == Carried(traceparent=value if valid else None)
    assert [problem.kind for problem in problems] == [] if valid else ["garbled"]
    assert not valid or write(carried) == {"traceparent": value}


our_names = st.sampled_from([*WRITTEN, *map(str.lower, WRITTEN)])
anything = st.one_of(
    st.text(),
    st.binary(),
    st.text(" ;.%0123456789aeEfN+-\ud800"),
    st.tuples(*[st.one_of(st.floats().map(str), st.text())] * 3).map("; ".join),
)


@given(
    st.one_of(
        st.lists(st.tuples(st.one_of(our_names, st.text(), st.binary()), anything)),
        st.dictionaries(our_names, st.one_of(anything, st.lists(anything, max_size=3))),
    )
)
def test_no_headers_raise(headers: Any) -> None:
    carried, problems = parse(headers)
    assert parse(write(carried)) == (carried, []) or carried.deadline or carried.soft
    for deadline in (carried.deadline, carried.soft):
        if deadline is not None:
            assert 0 <= deadline.beat <= 2**53
            assert 0 <= deadline.left <= MAX_LEFT
    assert len(problems) <= 4


def test_a_deadline_that_readers_would_refuse_is_not_written() -> None:
    for beat, left in [(2.0**54, 1.0), (1.0, 2e9), (math.inf, math.inf)]:
        deadline = Deadline("a", beat, left)
        assert write(Carried(deadline, deadline)) == {}
    assert write(Carried(Deadline("a", 5.0, -0.5))) == {"Backbeat-Deadline": "a; 5.000; 0.000"}


def test_the_beat_counts_on_the_same_grid_and_what_was_left_on_another() -> None:
    deadline = Deadline("3f2a", 12345.25, 4.75)
    assert resolve(deadline, "3f2a", 12344.0) == 12345.25
    assert resolve(deadline, "3f2a", 20000.0) == 12345.25
    assert resolve(deadline, "77", 100.5) == 105.25
