"""``backbeat tempo``, ``pause`` and ``resume``: changes of the grid."""

from __future__ import annotations

import argparse

from .._session.lifecycle import session
from .._wire import encode
from .connection import settings


async def change_tempo(options: argparse.Namespace) -> int:
    """Change the tempo of the cluster."""
    async with session(settings(options), require_connection=True) as bb:
        beat = await bb.set_tempo(options.bpm, at_beat=options.at_beat, over=options.over)
    values = {"tempo_bpm": options.bpm, "effective_beat": beat}
    text = f"{options.bpm:g} BPM from beat {beat}"
    if options.over:
        values["over_beats"] = options.over
        text += f" on, over {options.over} beats"
    print(encode(values).decode() if options.json else text, flush=True)
    return 0


async def pause_grid(options: argparse.Namespace) -> int:
    """Have the grid stand still."""
    async with session(settings(options), require_connection=True) as bb:
        beat = await bb.pause(at_beat=options.at_beat)
    paused = {"paused": True, "effective_beat": beat}
    text = f"the grid stands still on beat {beat}"
    print(encode(paused).decode() if options.json else text, flush=True)
    return 0


async def resume_grid(options: argparse.Namespace) -> int:
    """Have a grid go on that stands still."""
    async with session(settings(options), require_connection=True) as bb:
        beat = await bb.resume()
    resumed = {"paused": False, "effective_beat": beat}
    text = f"the grid goes on from beat {beat}"
    print(encode(resumed).decode() if options.json else text, flush=True)
    return 0
