"""Retries inside a budget: stamina decides whether to try again, and the waits are in beats.

It needs ``pip install stamina``. The program calls a service that fails some times, first with
enough beats for that, then with too few, and then while the tempo changes.
"""

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina
import stamina.instrumentation

import backbeat_trio as backbeat

T = TypeVar("T")

ATTEMPTS = 6
TRY = 0.5  # the beats that an attempt should have; if fewer are left, it is not made


class Unavailable(Exception):
    """What a service raises if it cannot answer now."""


async def retry(bb: backbeat.Session, function: Callable[[], Awaitable[T]]) -> T:
    """Call a function until it succeeds, within the budget around the caller."""

    def may_retry(error: Exception) -> bool | float:
        if not isinstance(error, Unavailable) or bb.remaining().beats <= TRY:
            return False  # the error is raised now, and nobody waits for the deadline in vain
        return 0.0  # try again without a wait: a wait of stamina's would be in seconds

    wait = 0.0
    async for attempt in stamina.retry_context(
        on=may_retry,
        attempts=ATTEMPTS,
        timeout=None,  # this would be in seconds, too; the budget counts in its place
        # From these come `next_wait` and nothing else, so they may be beats.
        wait_initial=0.25,
        wait_max=4.0,
    ):
        # In beats, so a change of tempo and a pause apply to it. It leaves enough for the attempt.
        await bb.sleep(max(0.0, min(wait, bb.remaining().beats - TRY)))
        wait = attempt.next_wait * random.uniform(0.75, 1.25)
        with attempt:
            return await function()
    raise AssertionError("the last attempt has returned or raised")


class Service:
    """A service that fails some times before it answers. A call takes a tenth of a beat."""

    def __init__(self, bb: backbeat.Session, failures: int) -> None:
        self.bb = bb
        self.failures = failures
        self.calls: list[float] = []

    async def call(self) -> str:
        self.calls.append(self.bb.current_position())
        await self.bb.sleep(0.1)
        if len(self.calls) <= self.failures:
            raise Unavailable(f"it has failed {len(self.calls)} times")
        return f"it answered at attempt {len(self.calls)}"


async def ask(bb: backbeat.Session, failures: int, beats: float) -> None:
    service = Service(bb, failures)
    scope = bb.fail_after(beats)
    try:
        with scope:
            result = await retry(bb, service.call)
    except (Unavailable, backbeat.BeatBudgetExceeded) as error:
        result = f"{type(error).__name__}: {error}"
    begun = ", ".join(f"{position - service.calls[0]:.1f}" for position in service.calls)
    print(f"{result}; attempts after {begun} beats; {scope.beats_left:.1f} of {beats} beats left")


async def main() -> None:
    # What stamina logs would say that it waits for 0 seconds.
    stamina.instrumentation.set_on_retry_hooks(())
    async with backbeat.session(nats_url="memory://retries", tempo_bpm=300) as bb:
        await ask(bb, failures=3, beats=8)
        await ask(bb, failures=10, beats=3)
        # From the next downbeat on, each wait takes half as long, also the one that goes on then.
        await bb.set_tempo(600)
        await ask(bb, failures=4, beats=12)


if __name__ == "__main__":
    backbeat.run(main)
