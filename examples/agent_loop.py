"""An agent that plans by what is left of its budget, winds down in time, and hands in what it has.

Its model is a stand-in that answers by rules, after some beats. Like a real one, it knows what is
left only from the prompt.
"""

import re
from dataclasses import dataclass, field

import backbeat_trio as backbeat

QUESTIONS = ["what it costs", "who uses it", "how it fails", "what comes next"]
BUDGET = 10  # beats for the whole of it
FINISH = 8  # the soft edge: from this beat on, the agent writes down what it has


class Model:
    """A stand-in for a language model."""

    def __init__(self, bb: backbeat.Session) -> None:
        self.bb = bb
        self.prompts: list[str] = []

    async def ask(self, prompt: str) -> str:
        self.prompts.append(prompt)
        if prompt.startswith("Research"):
            thorough = "thoroughly" in prompt
            # One of them takes longer than anybody could plan for.
            await self.bb.sleep(9 if "how it fails" in prompt else 2.5 if thorough else 1)
            return "a long note" if thorough else "a short note"
        await self.bb.sleep(0.25)
        if prompt.startswith("Plan"):
            left = re.search(r"([\d.]+) beats? left", prompt)
            return "thoroughly" if left is None or float(left[1]) > 6 else "briefly"
        return f"A report of {prompt.count('note')} notes."


@dataclass
class Agent:
    """What the agent does, and what it has so far."""

    bb: backbeat.Session
    model: Model
    notes: list[str] = field(default_factory=list)

    async def research(self) -> None:
        for question in QUESTIONS:
            depth = await self.model.ask(f"Plan how to find out {question}. {self.bb.remaining()}.")
            print(f"beat {self.bb.current_position():.2f}: finds out {depth} {question}")
            note = await self.model.ask(f"Research {depth} {question}.")
            self.notes.append(f"{question}: {note}")

    async def run(self) -> str:
        with self.bb.fail_after(BUDGET, soft_after=FINISH) as scope:
            with scope.graceful() as wound_down:
                # In here, `remaining` counts to the soft edge.
                await self.research()
            # The block has ended at the soft edge at the latest. What follows has the rest.
            if wound_down.cancelled_caught:
                print(f"beat {self.bb.current_position():.2f}: winds down. {self.bb.remaining()}.")
            text = await self.model.ask(f"Write a report of {'; '.join(self.notes)}.")
            print(f"beat {self.bb.current_position():.2f}: hands in: {text}")
            return text
        raise AssertionError("`fail_after` raises if the budget runs out")


async def main() -> None:
    async with (
        backbeat.session(nats_url="memory://agent_loop", tempo_bpm=240) as bb,
        bb.operation("research", beats=BUDGET),
    ):
        await Agent(bb, Model(bb)).run()


if __name__ == "__main__":
    backbeat.run(main)
