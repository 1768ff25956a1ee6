"""Looking at, cancelling and resuming damaged run directories: no traceback, no hang, no foreign write, no kill."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import main
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from tests.launcher.engines import make_project, until
from tests.launcher.lifecycle.mutations import Mutation, mutations

SEED = int(os.environ.get("MUTATION_SEED", "14"))
COUNT = int(os.environ.get("MUTATIONS", "170"))
"""Mutations of each of the three runs."""

REMOVES = ("rm", "it", "--yes")
LOOKS = [
    ("list",),
    ("status", "it"),
    ("logs", "it"),
    ("logs", "-f", "it"),
    ("diff", "good", "it"),
    ("rm", "it", "--dry-run"),
]
ACTS = [REMOVES, ("cancel", "it"), ("resume", "it")]
COMMANDS = LOOKS + ACTS
AS_DATA = [
    *(("list", "--json"), ("status", "--json", "it"), ("logs", "--json", "it"), ("diff", "--json", "good", "it")),
    *(("wait", "--json", "it", "--timeout", "0s"), ("list", "--json", "--state", "unknown")),
]
HANG_SECONDS = {signal.ITIMER_PROF: 20, signal.ITIMER_REAL: 200}
"""Limits of a command: of its CPU, and of the time in which it may be waiting for a busy machine."""

MEMORY = 200 << 20
"""Bytes that a command may take more than before it."""

SCRIPT = """
import json, os, pathlib, sys, time
run = pathlib.Path(os.environ["LAUNCH_FINISHED"]).parents[2]
for step in range(1, 4):
    print("step", step)
    with open(f"{run}/metrics.jsonl", "a") as file:
        line = {"time": time.time(), "attempt": 1, "step": step, "total_steps": 3, "loss": 1 / step}
        file.write(json.dumps(line) + "\\n" + json.dumps({**line, "eval": {"f1": 0.5}}) + "\\n")
sys.stdout.flush()
if sys.argv[1] == "fail":
    raise SystemExit("no luck")
time.sleep(0 if sys.argv[1] == "end" else 300)
"""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Hang(BaseException):
    """A command takes too long."""


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Directories of real runs: one that ended, one that failed, one that is running, and that one stopped."""
    project = make_project(tmp_path_factory.mktemp("templates"), "local")
    runs = project.folder / "runs"
    (project.folder / "s.py").write_text(SCRIPT)
    project.launch("--cpus", "1", "--name", "good", "s.py", "end")
    project.launch("--cpus", "1", "--max-restarts", "1", "--name", "failed", "s.py", "fail", status=1)
    project.launch("--cpus", "1", "--detach", "--name", "running", "s.py", "sleep")
    until(lambda: len(RunDir(runs / "running").metrics()) == 6, "three steps")
    shutil.copytree(runs / "running", runs / "stopped")
    project.call("cancel", "--now", "running")
    shutil.copy2(runs / "running" / "result.json", runs / "stopped")
    (runs / "running" / "result.json").unlink()
    with subprocess.Popen(["sleep", "600"]) as child:
        started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        RunDir(runs / "running").write_job("local", f"{os.uname().nodename}:{child.pid}:{started}")
        yield {name: runs / name for name in ("good", "failed", "running", "stopped")}
        child.kill()


class Stage:
    """A folder with a run to damage, one to leave alone, and something outside of both."""

    def __init__(self, folder: Path, templates: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.runs, self.outside = folder, folder / "runs", folder / "outside"
        self.outside.mkdir()
        (self.outside / ".bashrc").write_text("untouched")
        (self.outside / "0.log").write_text("secret")
        shutil.copytree(templates["good"], self.runs / "good")
        self.sent: list[str] = []
        self.kills: list[object] = []
        self.naps = 0
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setattr("launcher.backends.local.LocalBackend.submit", self._refuse)
        monkeypatch.setattr("launcher.backends.local.LocalBackend.attach", self._refuse)
        for name in ("os.kill", "os.killpg", "signal.pidfd_send_signal"):
            monkeypatch.setattr(name, lambda *args: self.kills.append(args))
        monkeypatch.setattr(time, "sleep", self._nap)
        self.kept = self._state(self.runs / "good", self.outside)

    def _refuse(self, *_: object) -> str:
        self.sent.append("a job")
        raise BadRequest("the engine cannot be reached.")

    def _nap(self, seconds: float) -> None:
        self.naps += 1
        if self.naps > 2:
            raise KeyboardInterrupt

    @staticmethod
    def _state(*folders: Path) -> dict[str, tuple[int, int, int]]:
        """Mode, size and time of every entry below `folders`."""
        found, left = {}, [os.fsencode(folder) for folder in folders]
        while left:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    info = entry.stat(follow_symlinks=False)
                    found[entry.path.decode("latin-1")] = (info.st_mode, info.st_size, info.st_mtime_ns)
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
        return found

    def call(self, argv: tuple[str, ...]) -> tuple[int, str, str]:
        """Run a command in this process; returns its status and what it wrote."""
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
        self.naps = 0
        status: Any = 0
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]), limits():
            try:
                main(argv)
            except SystemExit as exited:
                status = exited.code
            except KeyboardInterrupt:  # of `_nap`
                pass
        out, err = (stream.buffer.getvalue().decode() for stream in streams)
        return status, out, err

    def faults(self, template: Path, mutation: Mutation, commands: Sequence[tuple[str, ...]]) -> Iterator[str]:
        """What is wrong with how the commands treat a damaged copy of `template`."""
        it = self.runs / "it"
        before = self._damage(it, template, mutation)
        for argv in commands:
            self.kills.clear()
            try:
                status, out, err = self.call(argv)
            except BaseException as error:
                yield f"{argv}: {type(error).__name__}: {error!s:.300}"
                continue
            yield from (f"{argv}: {fault}" for fault in self._of(argv, status, out, err))
            if self.kills and (template.name != "running" or argv[0] != "cancel" or mutation.file == "job.json"):
                yield f"{argv}: killed {self.kills}"
            after = self._state(it) if it.exists() else {}
            if after != before:
                # A refused resume puts back what it moved, with newer times of folders.
                same = argv[0] == "resume" and _without_times(after) == _without_times(before)
                if not (same or argv[0] == "cancel" or (argv == REMOVES and not after)):
                    yield f"{argv}: the run directory was changed"
                before = self._damage(it, template, mutation)
        if self._state(self.runs / "good", self.outside) != self.kept:
            yield f"something outside was changed by one of {commands}"

    def _damage(self, it: Path, template: Path, mutation: Mutation) -> dict[str, tuple[int, int, int]]:
        shutil.rmtree(it, ignore_errors=True)
        shutil.copytree(template, it, symlinks=True)
        mutation.apply(it / mutation.file)
        return self._state(it)

    def _of(self, argv: tuple[str, ...], status: int, out: str, err: str) -> Iterator[str]:
        if status not in (0, 1, 2, 3, *[124] * (argv[0] == "wait")):
            yield f"status {status}"
        if "Traceback" in err or "secret" in out or "untouched" in out:
            yield f"{out[-200:]}{err[-500:]}"
        shown = re.sub(r"\x1b\[[0-9;:]*m", "", out) if argv[0] == "logs" and "--json" not in argv else out
        if found := CONTROL.search(shown + err):
            yield f"shows {found[0]!r}"
        if argv == ("list",) and not re.search(r"^good +succeeded +local ", out, re.MULTILINE):
            yield f"hides the good run: {out:.300}{err:.300}"
        if "--json" in argv:
            json.loads(out)
        if len(err) > 100_000:
            yield "floods stderr"


def _without_times(state: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int]]:
    return {name: (mode, 0 if stat.S_ISDIR(mode) else size) for name, (mode, size, _) in state.items()}


@contextmanager
def limits() -> Iterator[None]:
    """Raise Hang after one of `HANG_SECONDS`, and MemoryError for more than `MEMORY`."""

    def alarm(*_: object) -> None:
        raise Hang

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    handlers = {number: signal.signal(number, alarm) for number in (signal.SIGALRM, signal.SIGPROF)}
    for timer, seconds in HANG_SECONDS.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in HANG_SECONDS:
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def stage(tmp_path: Path, templates: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, templates, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["failed", "running", "stopped"])
def test_damaged_runs(stage: Stage, templates: dict[str, Path], name: str) -> None:
    generator = random.Random(SEED)
    made = list(mutations(templates[name], stage.outside, generator, values=200))
    chosen = generator.sample(made, min(len(made), COUNT))
    found = [
        f"{m}: {fault}"
        for number, m in enumerate(chosen)
        for fault in stage.faults(templates[name], m, COMMANDS + AS_DATA * (number % 5 == 0))
    ]
    assert not found, "\n".join([f"MUTATION_SEED={SEED}: {len(found)} faults in {len(chosen)} mutations", *found[:50]])


HOSTILE = [
    "a\x1b[2Jb",
    "\x1b]0;title\x07",
    "new\nline",
    "tab\tname",
    "\u202etxt.exe",
    "\udc9b31m",
    "--me",
    "-rf",
    "x" * 250,
    " ",
    "漢 é",
]


def test_names_of_runs(stage: Stage, templates: dict[str, Path]) -> None:
    for name in HOSTILE:
        shutil.copytree(templates["failed"], stage.runs / name)
        fault = [*stage.faults(templates["failed"], Mutation("job.json", "nothing", lambda _: None), [("list",)])]
        argv = [("status", "--", f"runs/{name}"), ("logs", "--", f"runs/{name}"), ("status", "--", f"{name}x")]
        for each in argv:
            fault += stage._of(each, *stage.call(each))
        assert fault == []
        shutil.rmtree(stage.runs / name)


def test_an_odd_folder_of_runs(stage: Stage) -> None:
    (stage.runs / "file").write_text("")
    (stage.runs / "empty").mkdir()
    os.mkfifo(stage.runs / "pipe")
    (stage.runs / "dangling").symlink_to("nothing")
    (stage.runs / "circle").symlink_to("circle")
    (stage.runs / "above").symlink_to("..")
    status, out, err = stage.call(("list",))
    assert (status, len(out.splitlines()), err) == (0, 1, "")
    for name in ("file", "empty", "pipe", "dangling", "circle", "above"):
        status, out, err = stage.call(("status", name))
        assert (status, out, f"there is no run {name!r}" in err) == (2, "", True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can read."""
    folder = Path(tempfile.mkdtemp(prefix="launch-mutations-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")
def test_runs_of_another_user(open_folder: Path, templates: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(open_folder, templates, monkeypatch)
    for path in (stage.runs, *stage.runs.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    stage.kept = stage._state(stage.runs / "good", stage.outside)
    shutil.copytree(templates["failed"], stage.runs / "it")
    for argv in COMMANDS:
        stage.call(argv)  # imports what it needs, which the other user may not read
    shutil.copytree(stage.runs / "good", stage.runs / "it")
    for file in (
        "",
        "plan.json",
        "job.json",
        "result.json",
        "events.jsonl",
        "metrics.jsonl",
        "logs",
        "logs/1/0.log",
        "errors",
    ):
        shutil.rmtree(stage.runs / "it")
        shutil.copytree(stage.runs / "good", stage.runs / "it")
        (stage.runs / "it" / file).chmod(0)
        before = stage._state(stage.runs / "it")
        os.seteuid(65534)
        try:
            outcomes = {argv: stage.call(argv) for argv in COMMANDS}
        finally:
            os.seteuid(0)
        assert stage._state(stage.runs / "it") == before, file
        faults = [fault for argv, found in outcomes.items() for fault in stage._of(argv, *found)]
        assert faults == [], file
        assert {outcomes[argv][0] for argv in ACTS} == {2}, "only the owner acts"
        line = next(line for line in outcomes["list",][1].splitlines() if line.startswith("it "))
        needed = ("", "plan.json", "result.json")  # of an ended run
        assert ("unreadable: " in line and "Permission denied" in line) == (file in needed), line
    assert stage.kills == []
    assert stage._state(stage.runs / "good", stage.outside) == stage.kept
