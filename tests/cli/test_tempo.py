"""``backbeat tempo``, ``pause`` and ``resume``."""

from __future__ import annotations

import functools
import json

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
        done = await backbeat("tempo", "300", "-s", url, "--at-beat", str(2**53))
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
        assert done.stdout == f"the grid goes on from beat {beat}\n".encode()
        with trio.fail_after(60):
            await bb.sleep(1)
        assert not bb.health().paused
        assert bb.tempo_bpm == 1200.0
        assert bb.statistics().locks == 1
        done = await backbeat("resume", "-s", url)
        assert done.returncode == 1
        done = await backbeat("pause", "-s", url, "--at-beat", "1000000")
        assert done.stdout == b"the grid stands still on beat 1000000\n"
