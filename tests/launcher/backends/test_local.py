"""Tests of the local backend: Ctrl-C, and the loss of a rank or of its supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.engines import Project, ranks_of, until
from training.files import read_lines

pytestmark = pytest.mark.slow

DEAF = """
import time

def main(ctx):
    ctx.log(1, loss=1.0)
    time.sleep(600)
"""


def processes(run: str) -> list[int]:
    """The pids of the run's forkserver, of its ranks and of their standbys."""
    found = subprocess.run(
        ["pgrep", "-f", f"launcher.rank.(forkserver|worker import enter).*/{run} [0-9]+"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(pid) for pid in found.stdout.split()]


def has_stepped(project: Project, run: str) -> bool:
    return bool((project.folder / "runs" / run / "metrics.jsonl").exists())


def test_ctrl_c_saves_and_stops_and_the_run_goes_on(local_project: Project) -> None:
    arguments = ("--cpus", "2", "--name", "c", "training.train:train", "--max-steps", "300", "--epochs", "50")
    with local_project.start(*arguments) as running:
        until(lambda: has_stepped(local_project, "c"), "a first step")
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 3
    assert "with a checkpoint" in err
    assert "`launch resume c` resumes" in out
    saved = [e["step"] for e in local_project.events("c") if e["event"] == "saved"]
    status = local_project.status("c")
    assert status["state"] == "stopped"
    assert 1 <= saved[-1] < 300
    local_project.call("resume", "c")
    status = local_project.status("c")
    assert (status["state"], status["metrics"]["steps"]) == ("succeeded", 300)
    assert any(e["event"] == "resumed" and e["step"] == saved[-1] for e in local_project.events("c"))


def test_ctrl_c_twice_stops_at_once(local_project: Project) -> None:
    (local_project.folder / "deaf.py").write_text(DEAF)
    with local_project.start("--cpus", "2", "--name", "d", "deaf:main") as running:
        until(lambda: has_stepped(local_project, "d"), "a first step")
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=20)
    assert running.returncode == 3
    assert local_project.status("d")["state"] == "stopped"
    until(lambda: not processes("d"), "no process", 5)


def test_a_killed_rank_is_replaced_in_place(local_project: Project) -> None:
    with local_project.start("--cpus", "2", "--name", "k", "steps:main", "--steps", "600") as running:
        until(lambda: has_stepped(local_project, "k"), "a first step")
        os.kill(ranks_of(local_project.folder / "runs/k/logs/1")[1], signal.SIGKILL)
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "killed: rank" in out
    assert "starting all ranks again (2 restarts left)" in out
    status = local_project.status("k")
    assert (status["state"], status["attempt"]) == ("succeeded", 2)
    assert status["metrics"]["first"] >= 1, "it went on where it was"


def test_a_killed_agent_takes_its_ranks_along(local_project: Project) -> None:
    local_project.launch("--detach", "--cpus", "2", "--name", "a", "steps:main", "--steps", "4000")
    until(lambda: has_stepped(local_project, "a"), "a first step")
    _, pid, _ = local_project.status("a")["job_id"].rsplit(":", 2)
    os.kill(int(pid), signal.SIGKILL)
    until(lambda: not processes("a"), "no rank", 5)
    until(lambda: local_project.status("a")["state"] == "lost", "the loss to be known", 30)
    assert "ended without a result" in local_project.call("status", "a").stdout
    (local_project.folder / "runs/a/state.json").write_text("3999")
    local_project.call("resume", "a")
    assert local_project.status("a")["state"] == "succeeded"


def test_data_that_cannot_be_used_is_a_bad_request(local_project: Project) -> None:
    data = local_project.folder / "data.csv"
    data.write_text("sentence1,sentence2,label\na,b,7\nc,d,0\n")
    arguments = ("--name", "b", "--", "--train-file", "data.csv", "--validation-file", "data.csv")
    done = local_project.call(*arguments, status=2)
    assert "7" in done.stderr
    assert "label" in done.stderr
    data.write_text("first,second,label\na,b,1\n")
    done = local_project.call(*arguments, status=2)
    assert "sentence1" in done.stderr
    assert not (local_project.folder / "runs/b").exists(), "the name stays free"


def test_ranks_that_never_connect_are_found(local_project: Project) -> None:
    profile = local_project.folder / "impatient.toml"
    profile.write_text('extends = "local"\nhang_after = 4.0\n')
    local_project.launch("--cluster", str(profile), "--cpus", "2", "--name", "u", "unconnected:main")
    failed = next(event for event in local_project.events("u") if event["event"] == "failed")
    assert (failed["kind"], failed["rank"], failed["step"]) == ("hung", None, None)
    assert "the 2 ranks did not connect to each other: rank 0 at" in failed["message"]
    assert local_project.status("u")["metrics"] == {"ranks": 2}


def test_hangs_are_found_and_the_rank_at_fault_is_named(local_project: Project) -> None:
    profile = local_project.folder / "impatient.toml"
    profile.write_text('extends = "local"\nhang_after = 4.0\n')
    local_project.launch("--cluster", str(profile), "--cpus", "2", "--name", "h", "hangs:main")
    failures = [event for event in local_project.events("h") if event["event"] == "failed"]
    assert [(f["kind"], f["rank"]) for f in failures] == [("hung", 1), ("hung", 0), ("hung", 1)]
    stopped, loading, skipped = (f["message"] for f in failures)
    assert stopped.startswith("rank 1 is stopped (SIGSTOP or a terminal) at step 4")
    assert re.fullmatch(
        r"rank 0 did not enter barrier #[\d,]+ \(process group 1, gloo\), which rank 1 waits in;"
        r" rank 0 is after step 8 at .*/hangs\.py:\d+ in load",
        loading,
    )
    assert re.fullmatch(
        r"rank 1 did not enter barrier #[\d,]+ \(.*\), which rank 0 waits in; rank 1 is after step 13 at .*",
        skipped,
    )
    log = local_project.folder / "runs" / "h" / "logs" / "2" / "0.log"
    assert "in load" in log.read_text(), "the whole stack is in the log"
    assert local_project.status("h")["state"] == "succeeded"


def test_a_hang_far_from_the_collectives_is_named_by_what_the_ranks_entered(local_project: Project) -> None:
    profile = local_project.folder / "impatient.toml"
    profile.write_text('extends = "local"\nhang_after = 4.0\n')
    arguments = ("--max-restarts", "5", "--cpus", "3", "--name", "d", "desync:main")
    local_project.launch("--cluster", str(profile), *arguments, status=1)
    failures = [event for event in local_project.events("d") if event["event"] == "failed"]
    late, subgroup, crosswise, sizes = (f["message"] for f in failures)
    assert [(f["kind"], f["rank"]) for f in failures] == [("hung", 1), ("hung", 2), ("hung", None), ("user error", 2)]
    assert re.fullmatch(
        r"rank 1 did not enter all_reduce #4 \(process group 0, default_pg, gloo\), which ranks 0 and 2 wait in;"
        r" rank 1 is after step 3 at .*/desync\.py:\d+ in compute",
        late,
    )
    assert re.fullmatch(
        r"rank 2 did not enter all_reduce #4 \(process group 2, pair, gloo\), which rank 1 waits in; .* in compute",
        subgroup,
    )
    assert crosswise == (
        "the ranks wait for each other: ranks 0 and 2 wait in all_reduce #4 (process group 0, default_pg, gloo) for rank 1;"
        " rank 1 waits in all_reduce #4 (process group 2, pair, gloo) for rank 2"
    )
    assert sizes.startswith(
        "the ranks disagree on collective #4 (process group 0, default_pg, gloo): ranks 0-1 entered all_reduce of sizes [[3]];"
        " rank 2 entered broadcast of sizes [[3]]; rank 2 is after step 3 at "
    )
    record = json.loads((local_project.folder / "runs/d/logs/1/0.collectives.json").read_text())
    assert record["rank"] == 0
    assert local_project.status("d")["failure"]["message"] == sizes


FILLS = """
def main(ctx):
    with open(ctx.run_dir / "big", "wb") as big:
        while True:
            big.write(bytes(1 << 16))
            big.flush()
"""


def test_a_full_disk_is_told_by_its_name(local_project: Project, disk: Path) -> None:
    """Also on a full disk: the run reserves space for its result."""
    (local_project.folder / "fills.py").write_text(FILLS)
    (local_project.folder / "small.toml").write_text(f'extends = "local"\nruns = "{disk}"\n')
    done = local_project.call("--cluster", "./small.toml", "--cpus", "2", "--name", "d", "fills:main", status=1)
    result = json.loads((disk / "d/result.json").read_text())
    assert (result["state"], result["failure"]["kind"]) == ("failed", "disk full")
    assert "Free space where the run directory lies" in done.stdout
    assert not (disk / "d/.reserve").exists()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written; open files remain open."""
    for options in (["--bind", folder], ["-o", "remount,ro,bind"]):
        subprocess.run(["mount", *options, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_run_waits_for_a_mount_that_comes_back(local_project: Project, disk: Path) -> None:
    (local_project.folder / "small.toml").write_text(f'extends = "local"\nruns = "{disk}"\n')
    steps = ("steps:main", "--steps", "100", "--seconds", "0.02")
    with local_project.start("--cluster", "./small.toml", "--cpus", "2", "--name", "gone", *steps) as run:
        metrics = disk / "gone/metrics.jsonl"
        until(lambda: len(read_lines(metrics)) > 5, "some steps")
        with read_only(disk):
            until(lambda: not ranks_of(disk / "gone/logs/1"), "the end of the ranks")
            assert processes("gone"), "the process that they come from is still there"
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    failures = [event for event in read_lines(disk / "gone/events.jsonl") if event["event"] == "failed"]
    assert [failure["kind"] for failure in failures] == ["storage"]
    assert sorted({line["step"] for line in read_lines(metrics)}) == list(range(1, 101))


JUMPS = """
import time
from contextlib import suppress

right = time.time

def jumped():
    with suppress(OSError, ValueError), open({file!r}) as file:
        return right() + float(file.read())
    return right()

time.time = jumped
"""


def test_a_clock_that_jumps_is_not_noticed(local_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all processes of the run at once, as if the machine's clock is corrected."""
    clock = local_project.folder / "clock"
    (local_project.folder / "site").mkdir()
    (local_project.folder / "site/sitecustomize.py").write_text(JUMPS.format(file=str(clock)))
    monkeypatch.setenv("PYTHONPATH", str(local_project.folder / "site"))
    metrics = local_project.folder / "runs/c/metrics.jsonl"
    steps = ("steps:main", "--steps", "150", "--seconds", "0.02")
    with local_project.start("--cpus", "2", "--name", "c", *steps) as run:
        for number, seconds in enumerate((3600, -7200, 60)):
            until(lambda past=30 * number: len(read_lines(metrics)) > past, "some steps")  # type: ignore[misc]
            clock.write_text(str(seconds))
            assert local_project.status("c")["state"] in ("running", "succeeded"), "the heartbeat's age says nothing"
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    lines = read_lines(metrics)
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert max(line["time"] for line in lines) - min(line["time"] for line in lines) > 3600, "it did jump"
    assert not [event for event in local_project.events("c") if event["event"] in ("failed", "stopping", "restarted")]


def test_the_environment_of_a_run_is_on_record_without_its_secrets(
    local_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    local_project.launch("--cpus", "1", "--name", "e", "steps:main", "--steps", "1")
    record = json.loads((local_project.folder / "runs/e/environment.json").read_text())
    assert record["packages"]["torch"]
    assert record["variables"]["NCCL_DEBUG"] == "WARN"
    assert "hf_secret" not in json.dumps(record)


def test_after_its_run_directory_was_removed_the_supervisor_still_ends_on_sigterm(local_project: Project) -> None:
    (local_project.folder / "waits.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    local_project.launch("--cpus", "2", "--name", "gone", "--detach", "waits.py")
    until(lambda: local_project.logs("gone") == ["[0] up", "[1] up"], "the ranks to run")
    pid = int(local_project.status("gone")["job_id"].split(":")[1])
    supervisor = os.pidfd_open(pid)
    try:
        shutil.rmtree(local_project.folder / "runs/gone")
        signal.pidfd_send_signal(supervisor, signal.SIGTERM)
        until(lambda: select.select([supervisor], [], [], 0)[0], "the end of the supervisor", 20)
    finally:
        os.close(supervisor)
    assert processes("gone") == []
    assert not (local_project.folder / "runs/gone").exists()


def test_a_removed_run_directory_does_not_hold_a_supervisor_whose_ranks_have_ended(local_project: Project) -> None:
    """It waits for a mount that may come back; SIGTERM ends the wait."""
    (local_project.folder / "waits.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    local_project.launch("--cpus", "1", "--name", "gone", "--max-restarts", "0", "--detach", "waits.py")
    until(lambda: local_project.logs("gone") == ["up"], "the rank to run")
    pid = int(local_project.status("gone")["job_id"].split(":")[1])
    rank = ranks_of(local_project.folder / "runs/gone/logs/1")[0]
    supervisor = os.pidfd_open(pid)
    try:
        shutil.rmtree(local_project.folder / "runs/gone")
        os.kill(rank, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{rank}").exists(), "the end of the rank")
        signal.pidfd_send_signal(supervisor, signal.SIGTERM)
        until(lambda: select.select([supervisor], [], [], 0)[0], "the end of the supervisor", 20)
    finally:
        os.close(supervisor)


def test_a_home_that_cannot_be_written(local_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/proc/none")
    local_project.launch("--cpus", "1", "--name", "h", "--", "--max-steps", "2", "--log-with=")
    assert local_project.status("h")["state"] == "succeeded"
    assert "cannot be written, so the tokens are not kept" in "\n".join(local_project.logs("h"))
