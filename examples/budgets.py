"""Three budgets: nested ones, one with a shielded clean-up, and one during a change of tempo."""

import trio

import backbeat_trio as backbeat


async def nested(bb: backbeat.Session) -> None:
    # The nearest deadline cancels. Each scope says whether it was the one that did so.
    with bb.move_on_after(6) as outer:
        with bb.move_on_after(2) as inner:
            await trio.sleep_forever()
        print(f"inner ended: {inner.cancelled_caught}; {outer.beats_left:.1f} beats left outside")
        assert inner.cancelled_caught
        assert not outer.cancel_called


async def cleaned_up(bb: backbeat.Session) -> None:
    # A shielded clean-up has a budget of its own, and the outer one, which has run out, does not
    # cancel it.
    try:
        with bb.fail_after(2):
            try:
                await trio.sleep_forever()
            finally:
                with bb.move_on_after(3, shield=True) as grace:
                    await bb.sleep(1)
                print(f"clean-up was cut short: {grace.cancelled_caught}")
    except backbeat.BeatBudgetExceeded as error:
        print(f"refused: {error}")
    else:
        raise AssertionError("the budget did not end")


async def under_a_change_of_tempo(bb: backbeat.Session) -> None:
    # The budget is sixteen beats. From the change on, each beat lasts half as long. The budget ends
    # on the same beat as it would have without the change, only sooner in seconds.
    start, first = trio.current_time(), bb.current_position()
    with bb.move_on_after(16) as scope:
        effective = await bb.set_tempo(2 * bb.tempo_bpm)
        print(f"tempo changes on beat {effective}, a downbeat")
        assert effective % 8 == 0
        await trio.sleep_forever()
    beats, seconds = bb.current_position() - first, trio.current_time() - start
    print(f"it had {beats:.1f} beats, in {seconds:.1f} s at {bb.tempo_bpm:g} BPM in the end")
    assert scope.cancelled_caught


async def main() -> None:
    async with backbeat.session(nats_url="memory://budgets", tempo_bpm=300) as bb:
        await nested(bb)
        await cleaned_up(bb)
        await under_a_change_of_tempo(bb)


if __name__ == "__main__":
    trio.run(main)
