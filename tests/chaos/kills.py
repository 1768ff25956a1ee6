"""Kill the ranks of a function and of a Trainer by random schedules, and compare with runs that were never killed."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.moments import KINDS, Killer, Moment
from tests.chaos.programs import kill_targets
from tests.training.loop.jobs import evaluations, ids_of_epochs
from tests.training.ranks import assert_same_checkpoint, losses, serving, spawn

SIZES = (1, 2, 4)
PRELOAD = "tests.chaos.programs.kill_libraries"  # of the server from which ranks are forked
LIVES = (1, 3)  # fewest and most lives of a schedule that are killed


@dataclass(frozen=True)
class Target:
    """A program of the harness: its rank function, the folder of its checkpoints, and the size of its work."""

    work: Callable[..., Any]
    saves: str
    steps: int
    samples: int
    epochs: int
    compare: Callable[[Path, Path], None]  # the runs of a fixed number of ranks


def same_end(left: Path, right: Path) -> None:
    """Bit-identical weights, optimizer, generators, position, losses of all steps and evaluations."""
    assert_same_checkpoint(left, right)
    assert evaluations(left) == evaluations(right)


def same_samples(left: Path, right: Path) -> None:
    """The samples of each epoch: a Trainer draws other random numbers after a checkpoint at the end of an epoch."""
    one, other = ids_of_epochs(left), ids_of_epochs(right)
    assert {epoch: sorted(ids) for epoch, ids in one.items()} == {epoch: sorted(ids) for epoch, ids in other.items()}


TARGETS = {
    "function": Target(kill_targets.function, "checkpoints", 21, 53, 3, same_end),
    "trainer": Target(kill_targets.trainer, "trainer", 21, 56, 3, same_samples),
}


@dataclass
class Tally:
    """What the schedules of one target have done."""

    schedules: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    mismatches: list[str] = field(default_factory=list)

    def line(self, target: str, mode: str) -> str:
        """A line of the table."""
        kinds = "  ".join(f"{self.kills[kind]:4}" for kind in KINDS)
        return f"{target:<9} {mode:<9} {self.schedules:>9}  {kinds}  {len(self.mismatches):>10}  {self.seconds:>7.0f}"


HEAD = f"{'target':<9} {'ranks':<9} {'schedules':>9}  step  save  epoch  mismatches  seconds"


class Harness:
    """Plays schedules of one target in `folder`; `say` gets a line for each."""

    def __init__(self, folder: Path, name: str, seed: int, say: Callable[[str], object] = print) -> None:
        self.folder, self.name, self.seed, self.say = folder, name, seed, say
        self.target = TARGETS[name]
        self._whole: dict[int, Path] = {}

    def play(self, number: int, *, changing: bool) -> Tally:
        """Play one schedule: lives that are killed, and one that is not; then check what the run has done."""
        started_at = time.monotonic()
        chance = random.Random(f"{self.name} {self.seed} {number} {changing}")
        size = SIZES[number % len(SIZES)]
        run, tally, played = self.folder / f"{self.name}-{number}", Tally(1), []
        run.mkdir()
        sizes = itertools.cycle(chance.sample(SIZES, len(SIZES))) if changing else itertools.repeat(size)
        for now in itertools.islice(sizes, chance.randint(*LIVES)):
            moment = Moment.draw(chance, now, self.target.steps)
            struck = self._live(run, now, moment)
            tally.kills[moment.kind] += struck
            played.append(
                f"{now}: {moment.kind} {moment.count} of {moment.victims}{'' if struck else ' (not reached)'}"
            )
        try:
            spawn(self.target.work, next(sizes), run)
            self._check(run, None if changing else size)
        except AssertionError as error:
            tally.mismatches.append(f"schedule {number}: {error}")
        tally.seconds = time.monotonic() - started_at
        self.say(f"{self.name} {number}: {'; '.join(played)}: {tally.mismatches or 'equal'}")
        if not tally.mismatches:
            shutil.rmtree(run)
        return tally

    def _live(self, run: Path, size: int, moment: Moment) -> bool:
        killer = Killer(run, run / self.target.saves, moment)
        try:
            spawn(self.target.work, size, run, watch=killer)
        except AssertionError:
            if not killer.struck:  # else a rank that has lost its peer
                raise
        return killer.struck

    def _check(self, run: Path, size: int | None) -> None:
        epochs = ids_of_epochs(run)
        assert sorted(losses(run)) == list(range(1, self.target.steps + 1)), "not all steps were done"
        assert epochs.keys() == set(range(self.target.epochs))
        for epoch, ids in epochs.items():
            assert sorted(ids) == list(range(self.target.samples)), f"epoch {epoch}: {sorted(ids)}"
        if size is not None:
            self.target.compare(self._undisturbed(size), run)

    def _undisturbed(self, size: int) -> Path:
        if size not in self._whole:
            self._whole[size] = self.folder / f"{self.name}-whole-{size}"
            self._whole[size].mkdir()
            spawn(self.target.work, size, self._whole[size])
        return self._whole[size]


def table(folder: Path, name: str, seed: int, numbers: range, *, changing: bool) -> tuple[str, bool]:
    """Play schedules; returns the line of the table with the mismatches, and whether there are none."""
    harness, total = Harness(folder, name, seed, lambda text: print(text, flush=True)), Tally()
    with serving(PRELOAD):
        for number in numbers:
            tally = harness.play(number, changing=changing)
            total.schedules += 1
            total.kills += tally.kills
            total.seconds += tally.seconds
            total.mismatches += tally.mismatches
    text = total.line(name, "change" if changing else "1, 2, 4")
    return "\n".join([text, *total.mismatches]), not total.mismatches
