"""Plays a schedule of faults against runs, one after the other, and writes down what became of each."""

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

ROUNDS = 3  # times that every fault comes, before the quick ones come more often
PACE = 0.2  # seconds that a step takes longer while faults are still to come
START_SECONDS = 180.0
END_SECONDS = 240.0
PROGRAMS = Path(__file__).parent / "programs"

WELL = ("healed", "unaffected")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """What became of a run after one fault.

    Attributes:
        outcome: ``healed``, ``unaffected``, or how the run ended and whether resuming it by hand helped.
        seconds: from the fault to the next step, or None where that took a hand.
        lost: steps that had been done and were not in the checkpoint it went on from; None where nothing went on.
    """

    fault: str
    engine: str
    outcome: str
    seconds: float | None = None
    lost: int | None = None


@dataclass(frozen=True)
class Ending:
    """The end of a run: its state, whether its weights are those of an undisturbed run, and what it left behind."""

    engine: str
    faults: tuple[str, ...]
    state: str
    equal: bool
    left: tuple[str, ...]


def schedule(engine: str, seed: int, count: int, names: Sequence[str] = ()) -> list[Fault]:
    """`count` faults for an engine in an order that `seed` decides.

    Each comes `ROUNDS` times, as far as `count` allows, and no second time before all have come once; the rest is drawn by
    the faults' weights and strewn among them.
    """
    known = [f for f in FAULTS if engine in f.engines and (not names or f.name in names)]
    chance = random.Random(f"{engine} {seed}")
    rounds = [list(known) for _ in range(ROUNDS)] if known else []
    weights = [1.0 if names else f.weight for f in known]  # what is asked for by name may take its time
    for at in range(count - ROUNDS * len(known) if known else 0):
        rounds[at % ROUNDS] += chance.choices(known, weights)
    for each in rounds:
        chance.shuffle(each)
    return [fault for each in rounds for fault in each][:count]


class Player:
    """Plays faults on one engine, some in each run, against runs in `folder`."""

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
        """The hash of the weights in which a run ends that nothing happens to."""
        subject = Subject(self.project, "undisturbed")
        subject.start(pace=0)
        state = subject.wait_for_end(END_SECONDS)
        assert state is State.SUCCEEDED, f"a run without any fault is {state}: {subject.run.explain()}"
        return subject.weights()

    def play(self, faults: Sequence[Fault], expected: str, per_run: int = 5, deadline: float = float("inf")) -> None:
        """Play all `faults`, `per_run` in each run, until `deadline` (by `time.monotonic`).

        `expected` is the hash of the undisturbed weights.
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
            for name in suffered or [left[0].name]:  # a run that ended early leaves its other faults to the next one
                left.remove(next(fault for fault in left if fault.name == name))

    def _play(self, subject: Subject, faults: Sequence[Fault], expected: str, deadline: float) -> list[str]:
        """One run from its start to its end; returns the faults that it suffered."""
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
        """Strike, and wait for the next step: without a hand, and if that does not come, with one."""
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
            with contextlib.suppress(TestbedError):  # such as a node that has come back by itself
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
        """Steps of earlier attempts that the attempt of `after` had to do again."""
        earlier = max((r["step"] for r in subject.run.dir.metrics() if r["attempt"] < after.attempt), default=0)
        return max(0, earlier - (after.step - 1))

    def _nodes_left(self) -> list[str]:
        """Nodes that are not as they were; afterwards they are."""
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
        """Workers of Ray's that have something of a run in them, in words; killed now."""
        if not isinstance(self.cluster, RayCluster):
            return []
        deadline = time.monotonic() + 20
        while (left := self._actors(self.cluster)) and time.monotonic() < deadline:
            time.sleep(0.2)
        kill(left)
        return [f"{len(left)} workers of Ray"] if left else []

    @staticmethod
    def _actors(cluster: RayCluster) -> set[int]:
        # The last is Ray's, one for all jobs of a cluster, whoever came first.
        own = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
        return set(cluster.processes("ray::")).difference(*(cluster.processes(name) for name in own))
