"""``backbeat tempo``, ``pause`` and ``resume``."""

from __future__ import annotations

import functools
import json
import re

import pytest
import trio
from helpers import backbeat

from backbeat_trio.testing import open_session

from .programs import cluster


async def test_tempo() -> None:
    async with (
        cluster(bpm=600) as url,
        open_session(nats_url=url, cluster_id="chorus-production", require_connection=True) as bb,
    ):
        done = await backbeat("tempo", "1200", "-s", url, "-j")
        reply = json.loads(done.stdout)
        assert reply["tempo_bpm"] == 1200.0
        assert reply["effective_beat"] % 8 == 0
        with trio.fail_after(60):
            await bb.sleep_until(reply["effective_beat"])
        assert bb.tempo_bpm == 1200.0
        done = await backbeat("tempo", "300.5", "-s", url, "--at-beat", "100000")
        assert done.stdout == b"300.5 BPM from beat 100000\n"
        done = await backbeat("tempo", "300", "-s", url, "--at-beat", "1")
        assert done.returncode == 1
        assert "beat 1 is past" in done.stderr.decode()
        # What the wire cannot tell is refused at once, and what no clock can count by the leader.
        done = await backbeat("tempo", "300", "-s", url, "--at-beat", str(2**53), "--yes")
        assert "is too far ahead" in done.stderr.decode()
        for change in (
            functools.partial(bb.set_tempo, 60, at_beat=2**53 + 1),
            functools.partial(bb.pause, at_beat=2**53 + 1),
        ):
            with pytest.raises(ValueError, match="`at_beat` must be at most 9007199254740992"):
                await change()
        with pytest.raises(ValueError, match="`over` must be at most 9007199254740992"):
            await bb.set_tempo(60, over=2**53 + 1)


async def test_ramp_pause_and_resume() -> None:
    async with (
        cluster(bpm=600) as url,
        open_session(nats_url=url, cluster_id="chorus-production", require_connection=True) as bb,
    ):
        done = await backbeat("tempo", "1200", "--over", "16", "-s", url, "-j")
        reply = json.loads(done.stdout)
        assert (reply["tempo_bpm"], reply["over_beats"]) == (1200.0, 16)
        with trio.fail_after(60):
            await bb.sleep_until(reply["effective_beat"] + 8)
            assert 600 < bb.tempo_bpm < 1200
            await bb.sleep_until(reply["effective_beat"] + 16)
        assert bb.tempo_bpm == 1200.0
        done = await backbeat("pause", "-s", url, "-j")
        paused = json.loads(done.stdout)
        with trio.fail_after(60):
            await bb.sleep_until(paused["effective_beat"])
        assert bb.health().paused
        done = await backbeat("tempo", "60", "-s", url)
        assert done.returncode == 1
        assert "is paused" in done.stderr.decode()
        done = await backbeat("resume", "-s", url)
        beat = paused["effective_beat"]
        assert done.stdout == f"resumed from beat {beat} on\n".encode()
        with trio.fail_after(60):
            await bb.sleep(1)
        assert not bb.health().paused
        assert bb.tempo_bpm == 1200.0
        assert bb.statistics().locks == 1
        done = await backbeat("resume", "-s", url)
        assert done.returncode == 1
        done = await backbeat("pause", "-s", url, "--at-beat", "1000000")
        assert done.stdout == b"paused from beat 1000000 on\n"


async def test_the_tempo_and_what_is_pending_are_shown() -> None:
    async with cluster(bpm=600) as url:
        done = await backbeat("tempo", "-s", url)
        assert re.fullmatch(r"600 BPM on beat \d+\n", done.stdout.decode())
        for bpm, beat in ((1200, 100_000), (300, 110_000)):
            done = await backbeat("tempo", str(bpm), "-s", url, "--at-beat", str(beat))
            assert done.returncode == 0
        await backbeat("pause", "-s", url, "--at-beat", "120000")
        done = await backbeat("tempo", "-s", url)
        assert done.returncode == 0
        now, *pending = done.stdout.decode().splitlines()
        assert now.startswith("600 BPM on beat ")
        # 100,000 beats at 600 a minute take 167 min; 10,000 at 1200 are 8 min, at 300 they are 33.
        assert [re.sub(r", in .*", "", line) for line in pending] == [
            "1200 BPM from beat 100000",
            "300 BPM from beat 110000",
            "a pause from beat 120000",
        ]
        assert all(re.search(r", in [23]\.\d+ h$", line) for line in pending)
        done = await backbeat("tempo", "-s", url, "--json")
        shown = json.loads(done.stdout)
        assert (shown["tempo_bpm"], shown["paused"]) == (600.0, False)
        assert shown["pending"] == [
            {"beat": 100_000, "tempo_bpm": 1200.0},
            {"beat": 110_000, "tempo_bpm": 300.0},
            {"beat": 120_000, "tempo_bpm": 0.0},
        ]
        done = await backbeat("tempo", "-s", url, "--cluster-id", "empty", "--timeout", "300ms")
        assert done.returncode == 1
        assert done.stderr == b"backbeat: no metronome in cluster empty\n"
        assert not done.stdout


@pytest.mark.parametrize("command", [["tempo", "300"], ["pause"]])
async def test_a_beat_that_is_more_than_a_day_ahead_needs_a_yes(command: list[str]) -> None:
    async with cluster(bpm=600) as url:
        # A day has 864,000 beats.
        done = await backbeat(*command, "-s", url, "--at-beat", "2000000")
        assert done.returncode == 1
        assert re.fullmatch(
            r"backbeat: beat 2000000 is 2.31 days ahead, as the cluster is on beat \d+: say --yes "
            r"if that is what you mean\n",
            done.stderr.decode(),
        )
        done = await backbeat("tempo", "-s", url, "--json")
        assert json.loads(done.stdout)["pending"] == []
        for beat, yes in (("860000", []), ("2000000", ["--yes"])):
            done = await backbeat(*command, "-s", url, "--at-beat", beat, *yes)
            assert done.returncode == 0, done.stderr
            if command == ["pause"]:
                # Nothing can come after a pause.
                await backbeat("resume", "-s", url)
