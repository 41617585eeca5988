"""The smallest program with an agent, an operation and a budget.

It needs no server. The URL names a bus inside this process, which has a metronome of its own.
"""

import trio

import backbeat_trio as backbeat


async def ask_for_votes(bb: backbeat.Session) -> int:
    await bb.sleep(1)
    return 3


async def main() -> None:
    async with backbeat.session(nats_url="memory://quickstart", tempo_bpm=120) as bb:
        # Five beats are an estimate, from which progress is reported. They do not end anything.
        async with bb.operation("election", id="election-leader-2025", beats=5) as op:
            op.advance(backbeat.Phase.CONNECTING, peers=3)
            with bb.fail_after(2):  # a budget: two beats, however long they last
                votes = await ask_for_votes(bb)
            op.advance(backbeat.Phase.EXECUTING, peers=votes)
        # Leaving the block completed the operation; an exception would have failed it.

        with bb.move_on_after(2) as scope:
            await trio.sleep_forever()
        print(f"beat {bb.current_beat()}: {votes} votes, budget ended: {scope.cancelled_caught}")


if __name__ == "__main__":
    trio.run(main)
