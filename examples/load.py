"""Start a thousand operations, watch their claims go out on every beat, and complete them."""

import trio

import backbeat_trio as backbeat

OPERATIONS = 1000
BEATS = 6


async def main() -> None:
    async with backbeat.session(nats_url="memory://load", tempo_bpm=300) as bb:
        operations = [
            bb.start_operation("dht_store", id=f"test-op-{number}", beats=5)
            for number in range(OPERATIONS)
        ]
        print(f"{bb.health().active_operations} operations started")

        heard = 0
        async for beat in bb.beats():
            heard += 1 + beat.skipped
            print(f"beat {beat.index}: {bb.statistics().claims_sent} claims sent")
            if heard >= BEATS:
                break

        for operation in operations:
            operation.complete(peers=5)
        assert bb.health().active_operations == 0
        while bb.statistics().claims_pending:
            await bb.sleep(0.1)
        print(f"all completed: {bb.statistics().claims_sent} claims sent")


if __name__ == "__main__":
    trio.run(main)
