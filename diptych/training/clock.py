"""The wall clock of a run that has a budget of minutes instead of a number of steps."""

from __future__ import annotations

import time
from collections import deque

from diptych.machine.processes import place, total
from diptych.training.recipe import Recipe

RECENT = 5  # steps whose longest decides whether another one fits


class Clock:
    """Says how far a stage is: by its steps, or, where the recipe has ``minutes``, by the wall clock.

    Stages share the budget in proportion to their ``steps``, which then only set the scale of the schedule: halfway
    through its time a stage is where it would be after half of its steps. All processes read the clock of process 0.
    ``elapsed`` are the seconds that the run has used already, before it was resumed."""

    def __init__(self, recipe: Recipe, elapsed: float = 0.0) -> None:
        self.budget = recipe.minutes * 60 if recipe.minutes else None
        self.steps = [stage.steps for stage in recipe.stages]
        self.began = time.monotonic() - elapsed
        self.now = elapsed
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.warm = False

    def start(self) -> None:
        """Reads the clock as a stage begins; every process must call it."""
        self.warm = False  # the first step of a stage takes longer and says nothing about the next
        if self.budget is not None:
            self.now = self.elapsed()

    def tick(self) -> None:
        """Reads the clock after a step; every process must call it."""
        if self.budget is not None:
            before, self.now = self.now, self.elapsed()
            if self.warm:
                self.recent.append(self.now - before)
            self.warm = True

    def elapsed(self) -> float:
        """Seconds since the run began, without the time between an interruption and its resumption."""
        return total({"seconds": 0.0 if place()[0] else time.monotonic() - self.began})["seconds"]

    def position(self, stage: int, done: int) -> float:
        """How far the stage is, in steps of its schedule: ``done``, or its share of the time that is over."""
        if self.budget is None:
            return float(done)
        begin, end = self._edge(stage), self._edge(stage + 1)
        return min(max((self.now - begin) / (end - begin), 0.0), 1.0) * self.steps[stage]

    def over(self, stage: int, done: int) -> bool:
        """Whether the stage ends after ``done`` steps: no more, or no time for one more."""
        if self.budget is None:
            return done >= self.steps[stage]
        return done > 0 and self.now + max(self.recent, default=0.0) > self._edge(stage + 1)

    def _edge(self, stage: int) -> float:
        """The second at which a stage begins."""
        assert self.budget is not None
        return self.budget * sum(self.steps[:stage]) / sum(self.steps)
