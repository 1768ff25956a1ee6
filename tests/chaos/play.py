"""Inject a schedule of faults into runs, one after another, and record the result of each."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.request.spec import State
from tests.chaos.faults import FAULTS, Fault, Scene, Undo
from tests.chaos.subject import STEPS, Mark, Subject
from tests.launcher.engines import make_project
from tests.testbed.keeper import TestbedError, kill
from tests.testbed.ray import RayCluster
from tests.testbed.slurm import SlurmCluster

ROUNDS = 3  # minimum occurrences of each fault, before quick faults are added
PACE = 0.2  # extra seconds per step while faults are outstanding
START_SECONDS = 180.0
END_SECONDS = 240.0
PROGRAMS = Path(__file__).parent / "programs"

WELL = ("healed", "unaffected")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """The result of one fault.

    Attributes:
        outcome: ``healed``, ``unaffected``, or how the run ended and whether resuming it helped.
        seconds: from the fault to the next step; None if the run had to be resumed by hand.
        lost: steps that had to be repeated; None if the run did not continue.
    """

    fault: str
    engine: str
    outcome: str
    seconds: float | None = None
    lost: int | None = None


@dataclass(frozen=True)
class Ending:
    """The end of a run: its state, whether its weights are those of an uninterrupted run, and its remains."""

    engine: str
    faults: tuple[str, ...]
    state: str
    equal: bool
    left: tuple[str, ...]


def schedule(engine: str, seed: int, count: int, names: Sequence[str] = ()) -> list[Fault]:
    """`count` faults for an engine, in an order that depends on `seed`.

    Each fault occurs `ROUNDS` times, as far as `count` allows, and the first round has each once; the rest is drawn by the
    weights of the faults and mixed with the other rounds.
    """
    known = [f for f in FAULTS if engine in f.engines and (not names or f.name in names)]
    chance = random.Random(f"{engine} {seed}")
    rounds = [list(known) for _ in range(ROUNDS)] if known else []
    weights = [1.0 if names else f.weight for f in known]  # faults requested by name may take minutes
    for at in range(count - ROUNDS * len(known) if known else 0):
        rounds[at % ROUNDS] += chance.choices(known, weights)
    for each in rounds:
        chance.shuffle(each)
    return [fault for each in rounds for fault in each][:count]


class Player:
    """Injects faults on one engine, several per run, with runs in `folder`."""

    def __init__(
        self,
        folder: Path,
        engine: str,
        seed: int,
        cluster: SlurmCluster | RayCluster | None,
        say: Say = print,
        note: Callable[[Finding | Ending], None] = lambda _: None,
    ) -> None:
        self.project = make_project(folder, engine, PROGRAMS)
        self.engine, self.cluster, self.say, self.note = engine, cluster, say, note
        self.chance = random.Random(f"{engine} {seed} places")
        self.findings: list[Finding] = []
        self.endings: list[Ending] = []
        self._runs = 0

    def undisturbed(self) -> str:
        """The hash of the final weights of an uninterrupted run."""
        subject = Subject(self.project, "undisturbed")
        subject.start(pace=0)
        state = subject.wait_for_end(END_SECONDS)
        assert state is State.SUCCEEDED, f"a run without any fault is {state}: {subject.run.explain()}"
        return subject.weights()

    def play(self, faults: Sequence[Fault], expected: str, per_run: int = 5, deadline: float = float("inf")) -> None:
        """Play all `faults`, `per_run` in each run, until `deadline` (`time.monotonic`).

        `expected` is the hash of the weights of an uninterrupted run.
        """
        left = list(faults)
        while left and time.monotonic() < deadline:
            self._runs += 1
            subject = Subject(self.project, f"chaos-{self._runs}")
            try:
                suffered = self._play(subject, left[:per_run], expected, deadline)
            except BaseException:
                with contextlib.suppress(OSError):
                    subject.kill()
                    subject.left_behind(0)
                raise
            for name in suffered or [
                left[0].name
            ]:  # the remaining faults of a run that ended early are played in the next one
                left.remove(next(fault for fault in left if fault.name == name))

    def _play(self, subject: Subject, faults: Sequence[Fault], expected: str, deadline: float) -> list[str]:
        """Play one run from start to end; returns the names of the injected faults."""
        subject.start(PACE)
        suffered = self._disturb(subject, faults, deadline)
        subject.set_pace(0)
        state = subject.wait_for_end(END_SECONDS)
        if not state.done:
            subject.kill()
        ending = Ending(
            *(self.engine, tuple(suffered), state.value, subject.weights() == expected),
            left=(*subject.left_behind(), *self._nodes_left(), *self._actors_left()),
        )
        self.endings.append(ending)
        self.note(ending)
        self.say(f"{self.engine}: {subject.name} {ending}")
        return suffered

    def _disturb(self, subject: Subject, faults: Sequence[Fault], deadline: float) -> list[str]:
        suffered: list[str] = []
        for fault in faults:
            if time.monotonic() > deadline:
                break
            wanted = subject.newest() + self.chance.randint(3, 9)
            if not subject.wait(lambda at=wanted: subject.newest() >= at and subject.saved(), START_SECONDS):  # type: ignore[misc]
                self.say(f"{self.engine}: {subject.name} does not come to step {wanted}: {subject.state()}")
                break
            if subject.newest() > STEPS - 20:
                break
            try:
                finding = self._suffer(subject, fault)
            except (LookupError, ValueError, OSError, subprocess.SubprocessError, TestbedError) as error:
                self.say(f"{self.engine}: {subject.name}: {fault.name} did not strike: {error!r}")
                continue
            suffered.append(fault.name)
            self.findings.append(finding)
            self.note(finding)
            self.say(f"{self.engine}: {subject.name} step {wanted}: {finding}")
            if finding.lost is None:
                break
        return suffered

    def _suffer(self, subject: Subject, fault: Fault) -> Finding:
        """Inject a fault and wait for the next step; if there is none, resume the run by hand."""
        scene = Scene(subject, self.chance, self.cluster)
        before = subject.mark()
        struck = time.time()
        undo: Undo = fault.strike(scene) or (lambda: None)
        try:
            if fault.restarts:
                subject.wait(lambda: subject.first_of(before.attempt), fault.patience)
            else:
                reached = subject.newest()
                subject.wait(lambda: subject.newest() > reached + 2, fault.patience)
            after = subject.first_of(before.attempt)
            state = subject.state()
            if after is not None:
                return Finding(fault.name, self.engine, "healed", after.time - struck, self._lost(subject, after))
            if state is State.SUCCEEDED or (not state.done and subject.mark().time > time.time() - 5):
                return Finding(fault.name, self.engine, "unaffected", 0.0, 0)
        finally:
            with contextlib.suppress(TestbedError):  # such as a node that has returned by itself
                undo()
            subject.set_pace(PACE)
        return self._by_hand(subject, fault, before, state)

    def _by_hand(self, subject: Subject, fault: Fault, before: Mark, state: State) -> Finding:
        failure = (subject.run.dir.result() or {}).get("failure") or {}
        how = f"{state.value}: {failure['kind']}" if failure else state.value
        if not state.done:
            how = "stuck"
            subject.kill()
        if refused := subject.resume():
            return Finding(fault.name, self.engine, f"{how}; not resumed: {refused.splitlines()[-1]}")
        subject.wait(lambda: subject.first_of(before.attempt), START_SECONDS)
        after = subject.first_of(before.attempt)
        if after is None:
            return Finding(fault.name, self.engine, f"{how}; resumed, and then {subject.state().value}")
        return Finding(fault.name, self.engine, f"{how}; resumed by hand", lost=self._lost(subject, after))

    @staticmethod
    def _lost(subject: Subject, after: Mark) -> int:
        """Number of steps that the attempt of `after` had to repeat."""
        earlier = max((r["step"] for r in subject.run.dir.metrics() if r["attempt"] < after.attempt), default=0)
        return max(0, earlier - (after.step - 1))

    def _nodes_left(self) -> list[str]:
        """Restore the nodes; returns those that were not in order."""
        if not isinstance(self.cluster, SlurmCluster):
            return []
        deadline = time.monotonic() + 20
        while (
            left := [f"{name} is {state}" for name, state in self.cluster.node_states().items() if state != "idle"]
        ) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.cluster.reset()
        return left

    def _actors_left(self) -> list[str]:
        """Kill Ray workers that hold a part of a run; returns a description of each."""
        if not isinstance(self.cluster, RayCluster):
            return []
        deadline = time.monotonic() + 20
        while (left := self._actors(self.cluster)) and time.monotonic() < deadline:
            time.sleep(0.2)
        kill(left)
        return [f"{len(left)} workers of Ray"] if left else []

    @staticmethod
    def _actors(cluster: RayCluster) -> set[int]:
        # The last is an actor of Ray, shared by all jobs of a cluster.
        own = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
        return set(cluster.processes("ray::")).difference(*(cluster.processes(name) for name in own))
