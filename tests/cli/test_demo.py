"""``backbeat demo``."""

from __future__ import annotations

import pytest
from helpers import backbeat


@pytest.mark.parametrize("memory", [False, True], ids=["server", "memory"])
async def test_demo(memory: bool) -> None:
    flags = ["--memory"] if memory else []
    done = await backbeat("demo", "--bpm", "600", "--beats", "24", *flags)
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "tempo 600 -> 1200 BPM" in text
    assert "3 agents" in text
    for kind in ("election", "dht_store", "pubsub_sync", "peer_discovery"):
        assert f"  {kind} " in text
    assert not done.stderr
