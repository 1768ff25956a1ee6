"""How the cost of looking at runs grows: ``python -m benchmarks.scale_looking [LARGEST [list] [status] [follow] [registry]]``.

`launch list` of 10 to 10,000 runs that have ended; `launch status`, `launch status --json` and `launch logs -f` of one run with 10^3 to
10^6 lines of metrics and a tenth as many events. Times are CPU seconds of the whole command, of one run each.

``registry``: commands and the completion of names with 1,000 registered runs in 50 folders, in seconds, beside ``python -c pass``.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.paired import Case, command, measure
from benchmarks.paired import table as paired_table
from launcher.config.cluster import Cluster
from launcher.lifecycle.records import registry
from launcher.lifecycle.run_dir import FORMAT, RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target

LAUNCH = (sys.executable, "-m", "launcher")
FOLLOWED_SECONDS = 10.0
SIZES = (1000, 10_000, 100_000, 1_000_000)


def make_run(path: Path, lines: int, state: State | None = State.SUCCEEDED) -> RunDir:
    """Make a run of `lines` lines of metrics and a tenth as many events; without `state` it is still running.

    Every thousandth line is an evaluation, and most events are checkpoints.
    """
    run = RunDir(path)
    run.create()
    placement, target = Placement(1, 1, "cpu", why="one CPU rank"), Target("script", "x.py")
    run.write_plan(
        Plan(path.name, path, RunSpec("x.py"), "local", Cluster("local", "local"), placement, target, path, 60)
    )
    run.event("submitted", format=FORMAT, cluster="local")
    run.claim_attempt()
    begun = time.time() - 0.1 * lines - 60
    run.event("started", attempt=1, world_size=1, hosts=["node1"])
    with run.events_file.open("a") as file:
        for number in range(1, lines // 10 + 1):
            saved = {"time": begun + number + 0.05, "attempt": 1, "rank": 0, "event": "saved", "step": number * 10}
            file.write(json.dumps({**saved, "blocked": 0.01}, separators=(",", ":")) + "\n")
    with run.metrics_file.open("w") as file:
        for step in range(1, lines + 1):
            record: dict[str, object] = {"time": begun + 0.1 * step, "attempt": 1, "step": step}
            if step % 1000:
                record |= {
                    "epoch": step / lines,
                    "total_steps": lines,
                    "loss": 1 / step,
                    "lr": 1e-4,
                    "samples_per_second": 1e3,
                }
            else:
                record |= {"epoch": step / lines, "eval": {"accuracy": 1 - 1 / step}, "seconds": 0.05}
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
    run.log(1, 0).write_text("a line of output\n" * min(lines, 1000))
    if state is None:
        run.write_job("local", f"{os.uname().nodename}:{os.getpid()}:{_started()}")
    else:
        run.write_job("local", f"{os.uname().nodename}:999999:1")
        fields = {"steps": lines, "world_size": 1, "attempts": 1, "seconds": 1.0, "newest": run.newest_lines()}
        run.write_result(state, metrics={"accuracy": 0.5}, **fields)
        run.event("finished", attempt=1, state=state.value)
    return run


def _started() -> str:
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def cpu_seconds(argv: Sequence[str], cwd: Path) -> float:
    """CPU seconds of a command that has to succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*LAUNCH, *argv], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def followed(run: RunDir, cwd: Path) -> float:
    """The share of a core that `launch logs -f` of a running, silent run takes, without its start."""
    with subprocess.Popen([*LAUNCH, "logs", "-f", run.path.name], cwd=cwd, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(1000):
            child.stdout.readline()
        time.sleep(2)
        before = _spent(child.pid)
        time.sleep(FOLLOWED_SECONDS)
        spent = _spent(child.pid) - before
        child.kill()
    return spent / FOLLOWED_SECONDS


def _spent(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent between the two largest sizes: 0 is constant, 1 proportional to the size."""
    return math.log(max(seconds[-1], 1e-9) / max(seconds[-2], 1e-9)) / math.log(sizes[-1] / sizes[-2])


def table(title: str, unit: str, sizes: Sequence[int], measure: Callable[[int], float]) -> None:
    """Print a row for each size, and the growth."""
    found = []
    for size in sizes:
        found.append(measure(size))
        print(f"{title:<44} {size:>9,}  {found[-1]:8.3f} {unit}", flush=True)
    if len(sizes) > 1:
        print(f"{title:<44}    growth  n^{growth(sizes, found):.2f}", flush=True)


def lists(folder: Path, largest: int) -> None:
    """Measure ``launch list``; a run has 100 lines of metrics."""

    def listed(runs: int) -> float:
        for number in range(runs):
            make_run(folder / f"list{runs}" / "runs" / f"r{number}", 100)
        return cpu_seconds(["list", "--all"], folder / f"list{runs}")

    table(
        "list --all, ended runs of 100 lines", "s", [n for n in (10, 100, 1000, 10_000) if n * 100 <= largest], listed
    )


def statuses(folder: Path, largest: int) -> None:
    """Measure ``launch status`` of an ended and a running run, and of the running one ``--json``, which has the ledger."""
    sizes = [n for n in SIZES if n <= largest]
    for lines in sizes:
        make_run(folder / "runs" / f"e{lines}", lines)
        make_run(folder / "runs" / f"r{lines}", lines, None)
    table("status, lines of an ended run", "s", sizes, lambda n: cpu_seconds(["status", f"e{n}"], folder))
    table("status, lines of a running run", "s", sizes, lambda n: cpu_seconds(["status", f"r{n}"], folder))
    for again in ("first", "again"):
        title = f"status --json, running run, {again}"
        table(title, "s", sizes, lambda n: cpu_seconds(["status", "--json", f"r{n}"], folder))


def follows(folder: Path, largest: int) -> None:
    """Measure ``launch logs -f`` of a running run that writes nothing."""
    sizes = [n for n in SIZES if n <= largest]
    runs = {lines: make_run(folder / "runs" / f"f{lines}", lines, None) for lines in sizes}
    table("logs -f, lines of a silent running run", "cores", sizes, lambda n: followed(runs[n], folder))


REGISTERED = 1000
FOLDERS = 50
ROUNDS = 11


def registered(folder: Path, largest: int) -> None:
    """Measure commands and completion with `REGISTERED` runs; every hundredth of these is running."""
    os.environ["XDG_STATE_HOME"] = f"{folder}/state"
    for number in range(REGISTERED):
        path = folder / f"project{number % FOLDERS}" / "runs" / f"mrpc-{number}"
        registry.register(make_run(path, 10, None if number % 100 == 0 else State.SUCCEEDED).path)
    cwd = str(folder / "project0")
    script = folder / "completion.bash"
    with script.open("w") as file:
        subprocess.run([*LAUNCH, "completion", "bash"], stdout=file, check=True)
    launch = [str(Path(sys.executable).parent / "launch")]
    peer = {"python -c pass": command([sys.executable, "-c", "pass"])}
    commands = {
        "launch list": command([*launch, "list"], cwd),
        "launch list --all": command([*launch, "list", "--all"], cwd),
        "launch list --state running": command([*launch, "list", "--state", "running"], cwd),
        "launch status, without a run": command([*launch, "status"], cwd),
    }
    completions = {
        "launch status <TAB>": completion(script, cwd, "status", ""),
        "launch status mrpc-99<TAB>": completion(script, cwd, "status", "mrpc-99"),
        "launch cancel <TAB>": completion(script, cwd, "cancel", ""),
        "launch --<TAB>": completion(script, cwd, "--"),
    }
    found = measure(commands | completions | peer, ROUNDS)
    for title, cases in (("commands", commands), ("completion in bash", completions)):
        shown = {name: found[name] for name in (*cases, *peer)}
        paired_table(f"{REGISTERED:,} registered runs in {FOLDERS} folders: {title}", shown, next(iter(cases)))


def completion(script: Path, cwd: str, *words: str) -> Case:
    """A case: the wall time of one completion in a bash that has read the script, as at a TAB."""
    program = f"""
        source {script}; COMP_WORDS=(launch {" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words)}
        begun=$EPOCHREALTIME; _launch; ended=$EPOCHREALTIME
        echo $((${{ended/./}} - ${{begun/./}})) ${{#COMPREPLY[@]}}"""

    def run() -> float:
        done = subprocess.run(["bash", "-c", program], cwd=cwd, check=True, capture_output=True, text=True)
        microseconds, offered = map(int, done.stdout.split())
        if not offered:
            raise RuntimeError(f"nothing is offered for {words}")
        return microseconds / 1e6

    return run


PARTS = {"list": lists, "status": statuses, "follow": follows, "registry": registered}


def main() -> None:
    largest = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    parts = sys.argv[2:] or list(PARTS)
    print(
        f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; CPU seconds of the whole command, its start included"
    )
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "XDG_RUNTIME_DIR": ""}
            PARTS[part](Path(folder), largest)


if __name__ == "__main__":
    main()
