"""``backbeat demo``."""

from __future__ import annotations

import pytest
from helpers import backbeat

from .programs import parsed


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
    steps = [line[:7] for line in text.splitlines() if line.startswith("Step ")]
    assert steps == ["Step 1:", "Step 2:", "Step 3:", "Step 4:"]
    # What it names to try next can be typed.
    following = text.partition("What to try next")[2]
    for line in following.splitlines():
        program, _, rest = line.strip().rstrip(" &").partition(" ")
        if program == "backbeat" and not rest.startswith("help"):
            assert parsed(*rest.split()).params
    assert following.count("backbeat ") >= 4
    assert not done.stderr
