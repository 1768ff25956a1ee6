"""SLURM's variables of the shell: what its commands see, what a plan takes from them, and a run in a hostile shell."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.slurm.shell import (
    COMMANDS,
    KEPT,
    STEP_OPTIONS,
    USED,
    environment,
    from_shell,
    hidden,
    script_line,
)
from launcher.cli.main import main
from launcher.config.cluster import Cluster, Slurm
from launcher.errors import BadRequest
from tests.launcher.engines import Project, until
from tests.testbed.slurm import SlurmCluster

OPTIONS = (
    *(
        "SBATCH_WAIT",
        "SBATCH_EXPORT",
        "SBATCH_FUTURE_OPTION",
        "SQUEUE_STATES",
        "SQUEUE_FORMAT",
        "SACCT_FORMAT",
        "SINFO_ALL",
    ),
    *("SCONTROL_ALL", "SCANCEL_USER", "SALLOC_X", "SRUN_DEBUG", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS", "SLURM_JOB_ID"),
    *("SLURM_MEM_PER_CPU", "SLURM_HINT", "SLURM_UMASK", "SLURM_EXIT_ERROR", "SLURMD_NODENAME", "SPANK_X11"),
)
OTHERS = ("PATH", "HOME", "SLURMY", "MY_SLURM_CONF", "SINFONIA", "MUNGE_SOCKET", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_a_slurm_command_is_hidden(name: str) -> None:
    assert environment({name: "1", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize("name", [*KEPT, *OTHERS])
def test_what_leads_to_the_controller_and_what_is_not_slurms_stays(name: str) -> None:
    assert environment({name: "1"}) == {name: "1"}


def test_this_process_keeps_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_WAIT", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    assert (hidden(), environment()["SLURM_CONF"]) == (["SBATCH_WAIT"], "/etc/x")
    assert os.environ["SBATCH_WAIT"] == "1"


def documented(command: str) -> set[str]:
    """The input variables that the manual page of a command lists; empty without manual pages."""
    done = subprocess.run(
        ["man", "-P", "cat", command], capture_output=True, text=True, env={**os.environ, "MANWIDTH": "200"}
    )
    text = re.sub(r".\x08", "", done.stdout)
    _, _, listed = text.partition("ENVIRONMENT VARIABLES\n")
    return set(
        re.findall(
            r"^ +((?:SLURM|S[A-Z]+)_[A-Z0-9_]+)", listed.partition("\nOUTPUT ENV")[0].partition("\nEXAMPLES")[0], re.M
        )
    )


@pytest.mark.parametrize("command", ["sbatch", "squeue", "sacct", "sinfo", "scontrol", "scancel"])
def test_all_documented_variables_are_covered(command: str) -> None:
    if not (found := documented(command)):
        pytest.skip("this machine has no manual page of the command")
    assert set(environment(dict.fromkeys(found, "1"))) <= set(KEPT)


def test_the_script_removes_what_a_login_shell_set_again() -> None:
    wanted = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_CONF": "x",
        "SLURM_JWT": "t",
        "_SLURM_SPANK_OPTION_x": "1",
    }
    unwanted = dict.fromkeys([f"{prefix}X" for prefix in COMMANDS] + list(STEP_OPTIONS), "1")
    command = ["bash", "-c", f"set -e\n{script_line()}\nenv"]
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"], **wanted, **unwanted}, capture_output=True, text=True, check=True
    )
    left = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (set(left) & set(unwanted), left.items() >= wanted.items()) == (set(), True)


# ---- what a plan takes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), USED.items())
def test_a_place_is_taken_where_the_profile_is_open(name: str, key: str) -> None:
    site, lines = from_shell(Cluster("x", "slurm"), inherited={name: "gpu"})
    assert (getattr(site.slurm, key), lines) == ("gpu", (f"slurm.{key} = 'gpu', from {name}",))
    own = Cluster("x", "slurm", slurm=replace(Slurm(), **{key: "debug"}))  # type: ignore[arg-type]
    site, lines = from_shell(own, inherited={name: "gpu"})
    assert (site, lines) == (own, (f"{name}='gpu' is not used: the profile has slurm.{key} = 'debug'",))
    assert from_shell(own, inherited={name: "debug"}) == (own, ()), "both are the same"
    assert from_shell(own, inherited={name: ""}) == (own, ())


@pytest.mark.parametrize(
    ("limit", "time"),
    [
        ("90", "90m"), ("90:30", "91m"), ("1:30:00", "90m"), ("0:0:1", "1m"), ("2-0", "2880m"), ("1-12", "2160m"),
        ("1-12:30", "2190m"), ("1-12:30:30", "2191m"), ("0-0:5", "5m"),
    ],
)  # fmt: skip
def test_a_time_limit_of_sbatch(limit: str, time: str) -> None:
    site, lines = from_shell(Cluster("x", "slurm"), inherited={"SBATCH_TIMELIMIT": limit})
    assert (site.time, lines) == (time, (f"--time {time}, from SBATCH_TIMELIMIT",))


@pytest.mark.parametrize(
    ("site", "time", "why"),
    [
        (Cluster("x", "slurm"), "2h", "--time 2h counts"),
        (Cluster("x", "slurm", time="4h"), None, "time = '4h' of the profile counts"),
    ],
)
def test_a_time_limit_that_is_given_elsewhere(site: Cluster, time: str | None, why: str) -> None:
    shell = {"SBATCH_TIMELIMIT": "soon"}
    assert from_shell(site, time, shell) == (site, (f"SBATCH_TIMELIMIT='soon' is not used: {why}",))


@pytest.mark.parametrize(
    "shell",
    [
        {"SBATCH_TIMELIMIT": "soon"}, {"SBATCH_TIMELIMIT": "0"}, {"SBATCH_TIMELIMIT": "UNLIMITED"}, {"SBATCH_TIMELIMIT": "-1"},
        {"SBATCH_TIMELIMIT": "٣"}, {"SBATCH_TIMELIMIT": "9" * 5000}, {"SBATCH_TIMELIMIT": "999999999-0"},
        {"SBATCH_PARTITION": "a\n#SBATCH --wrap=x"}, {"SBATCH_QOS": "\x1b[2J"}, {"SBATCH_ACCOUNT": "x" * 5000},
        {"SBATCH_CONSTRAINT": "\udcff"},
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used(shell: Mapping[str, str]) -> None:
    with pytest.raises(BadRequest, match="^" + next(iter(shell)) + "=.*or unset the variable") as refused:
        from_shell(Cluster("x", "slurm"), inherited=shell)
    assert (len(str(refused.value)) < 300, str(refused.value).isprintable()) == (True, True)


def test_options_that_are_not_used_are_named() -> None:
    shell = {
        "SBATCH_WAIT": "",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_CLUSTERS": "b",
        "SQUEUE_SORT": "i",
        "SBATCH_\x1b[2J": "x",
    }
    assert from_shell(Cluster("x", "slurm"), inherited=shell)[1] == (
        "SBATCH_CLUSTERS is not used: the job is sent to the cluster of this host, or of SLURM_CONF",
        "SBATCH_EXPORT, SBATCH_WAIT are not used: `slurm.sbatch` of a profile has such options",
    )


def test_the_plan_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.toml").write_text(
        "backend = 'slurm'\nnodes = 2\nnode = {gpus = 0, cpus = 4}\n[slurm]\nqos = 'low'\n"
    )
    (tmp_path / "script.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for name, value in {"PARTITION": "gpu", "QOS": "high", "TIMELIMIT": "1:30:00", "WAIT": "1"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    monkeypatch.setenv("SLURM_CONF", os.devnull)
    with pytest.raises(SystemExit) as exited:
        main(["--cluster", "site.toml", "--cpus", "2", "--dry-run", "script.py"])
    shown = capsys.readouterr().out
    assert exited.value.code == 0
    assert [line for line in shown.splitlines() if line.startswith("  shell ")] == [
        "  shell  slurm.partition = 'gpu', from SBATCH_PARTITION",
        "  shell  SBATCH_QOS='high' is not used: the profile has slurm.qos = 'low'",
        "  shell  --time 90m, from SBATCH_TIMELIMIT",
        "  shell  SBATCH_WAIT is not used: `slurm.sbatch` of a profile has such options",
    ]
    for line in (
        "  limit  90 min (1h30m), from SBATCH_TIMELIMIT",
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=low",
        "#SBATCH --time=90",
    ):
        assert line in shown.splitlines()


# ---- on a real cluster ------------------------------------------------------------------------------------------

HOSTILE = {
    "SBATCH_WAIT": "1", "SBATCH_EXPORT": "NONE", "SBATCH_ARRAY_INX": "0-3", "SBATCH_NO_REQUEUE": "1", "SBATCH_GPUS": "32",
    "SBATCH_OUTPUT": "/nonexistent/%j", "SBATCH_JOB_NAME": "other", "SBATCH_NO_KILL": "1", "SBATCH_SIGNAL": "KILL@7200",
    "SBATCH_PARTITION": "urgent", "SBATCH_TIMELIMIT": "7", "SQUEUE_STATES": "PD", "SQUEUE_FORMAT": "%i", "SQUEUE_USERS": "nobody",
    "SQUEUE_PARTITION": "nosuch", "SACCT_FORMAT": "JobID", "SINFO_FORMAT": "%x", "SCONTROL_FUTURE": "1", "SCANCEL_USER": "nobody",
    "SCANCEL_STATE": "PENDING", "SCANCEL_INTERACTIVE": "1", "SLURM_TIME_FORMAT": "relative", "SLURM_CLUSTERS": "nosuch",
    "SLURM_NTASKS": "9", "SLURM_BITSTR_LEN": "1", "SLURM_UMASK": "0777", "SLURM_EXIT_ERROR": "77",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_from_a_shell_with_options_for_slurm(
    slurm_project: Project, on_slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    (slurm_project.folder / "waits.py").write_text("import time\ntime.sleep(600)\n")
    slurm_project.launch("--detach", "--cpus", "2", "--nodes", "2", "--name", "r", "waits.py")
    job = slurm_project.status("r")["job_id"]
    until(lambda: slurm_project.status("r")["state"] == "running", "the run to run")
    facts = dict(re.findall(r"(\w+)=(\S*)", on_slurm.run("scontrol", "show", "job", "--oneliner", job)))
    asked = {
        "TimeLimit": "04:00:00",  # of the profile
        "Partition": "urgent",
        "Requeue": "1",
        "JobName": "r",
        "NumNodes": "2",
        "JobId": job,
    }
    assert {key: facts[key] for key in asked} == asked
    until(lambda: any(e["event"] == "started" for e in slurm_project.events("r")), "the ranks to start")
    slurm_project.call("cancel", "r", "--now")
    until(lambda: slurm_project.status("r")["state"] in ("stopped", "lost"), "the run to end")
    slurm_project.launch("--cpus", "2", "--nodes", "2", "--name", "good", "steps:main", "--steps", "2")
    assert slurm_project.status("good")["state"] == "succeeded"


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_that_is_sent_without_the_shells_variables_runs(slurm_project: Project) -> None:
    """``export = "NONE"`` reaches srun as SLURM_EXPORT_ENV, which would keep the job's own variables from the agents."""
    folder = slurm_project.folder / "cluster_configs"
    folder.mkdir()
    text = 'extends = "slurm"\n[slurm]\nsetup = ["export MODULE=loaded"]\n[slurm.sbatch]\nexport = "NONE"\n'
    (folder / "none.toml").write_text(text)
    (slurm_project.folder / "prints.py").write_text("import os\nprint(os.environ.get('MODULE'), flush=True)\n")
    slurm_project.call("--cluster", "none", "--cpus", "2", "--nodes", "2", "--name", "none", "prints.py")
    assert [line.partition("] ")[2] for line in slurm_project.logs("none")] == ["loaded", "loaded"]
