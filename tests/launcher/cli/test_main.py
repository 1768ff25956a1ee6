"""Bad input at the command line is refused before submission, with a remedy; nothing reaches a shell."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.launch import parse_request
from launcher.cli.parser import COMMANDS
from launcher.config.cluster import Cluster
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target
from tests.launcher.engines import COMMAND, Launch

HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "a\nb",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "../../pwned",
    "| pwned",
    "ä",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, without a home."""
    made = tmp_path / "project"
    made.mkdir()
    (made / "script.py").write_text("import sys\nprint(sys.argv[1:])\n")
    (made / "cli_module.py").write_text("def function(): ...\ndef with_context(ctx): ...\n")
    (made / "cli_broken.py").write_text("def function(:\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(made)
    return made


def leave_run(folder: Path, name: str, state: State | None = None) -> RunDir:
    run = RunDir(folder / "runs" / name)
    run.create()
    target, site = Target("script", "script.py"), Cluster("local", "local")
    run.write_plan(
        Plan(name, run.path, RunSpec("script.py"), "local", site, Placement(1, 2, "cpu", why="2"), target, folder, 60)
    )
    run.write_job("local", "elsewhere:12:2")
    if state is not None:
        run.write_result(state, seconds=1.0, metrics={"accuracy": 0.5})
    return run


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "1", "--gpus", "2"], "--gpus is given twice."),
        (["--gpus=1", "--gpus=1"], "--gpus is given twice."),
        (["--name", "a", "--name", "a"], "--name is given twice."),
        (["-m", "a", "-m", "b"], "no module 'a'"),  # arguments after the module belong to it
        (["--gpu", "1"], "unknown option --gpu (did you mean '--gpus'?). `launch --help` lists them; options of the target"),
        (["--nam=x"], "unknown option --nam (did you mean '--name'?)"),
        (["--max_restart", "1"], "unknown option --max_restart (did you mean '--max-restarts'?)"),
        (["-x"], "-x: a value is needed."),
        (["-y"], "unknown option -y"),
        (["--lr", "3e-5"], "unknown option --lr"),
        (["--gpus"], "--gpus: a value is needed."),
        (["--gpus", "two"], "argument --gpus: invalid whole value: 'two'"),
        (["--gpus", "2.0"], "argument --gpus: invalid whole value: '2.0'"),
        (["--gpus", ""], "argument --gpus: invalid whole value: ''"),
        (["--gpus", "0"], "--gpus 0: at least 1 is needed."),
        (["--cpus", "-1"], "--cpus -1: at least 1 is needed."),
        (["--dry-run=yes"], "argument --dry-run: ignored explicit argument 'yes'"),
        (["--gpus", "1", "--cpus", "1"], "--gpus and --cpus together: a run uses one kind of device. Give one of them."),
        (["--max-restarts", "-1"], "--max-restarts -1: 0 or more is needed."),
        (["--time", "soon", "script.py"], "--time 'soon': write a duration such as 90m, 2h, 1d12h or 02:30:00; a number alone"),
        (["--backend", "slrum"], "--backend 'slrum': no such backend (did you mean 'slurm'?). Known: local, slurm, ray."),
        (["--backend", "ray", "--cluster", "local"], "--backend ray --cluster local: that cluster's backend is local."),
        (["--cluster", "locl"], "--cluster 'locl': no such profile (did you mean 'local'?). Known: "),
        (["--cluster", "./none.toml"], "none.toml: No such file or directory."),
        (["nosuch.py"], "no such script: nosuch.py (looked for"),
        (["script"], "target 'script': write package.module:function, path/to/script.py or -m module. Did you mean ./scri"),
        (["-m", "cli_modul"], "target '-m cli_modul': there is no module 'cli_modul' in"),
        (["-m", "cli_broken"], "cli_broken.py:1: the target is not valid Python"),
        (["cli_module:functoin"], "has no function 'functoin' (did you mean 'function'?). It has: function, with_context"),
        (["cli_broken:function"], "cli_broken.py:1: the target is not valid Python"),
        (["no_such_module:function"], "there is no module 'no_such_module'"),
        (["--topology", "4x4", "--gpus", "1", "script.py"], "--topology is the shape of a TPU slice; it goes with --tpus."),
        (["--tpus", "4", "script.py"], "--tpus needs --accelerator with the generation"),
        (["--gpus", "1", "script.py"], "the nodes of cluster 'local' have no GPUs"),
        (["status", "nosuch"], "there is no run 'nosuch' in"),
        (["status", "mrpc-lr3e5"], "Runs there: mrpc-lr3e-5. A path to a run directory works too."),
        (["status", "x" * 5000], "there is no run 'xxx"),
        (["wait"], "the following arguments are required: RUN"),
        (["diff", "done"], "diff: two runs are compared, 1 given."),
        (["rm"], "the following arguments are required: RUN"),
        (["rm", "mrpc-lr3e-5", "nosuch", "--yes"], "there is no run 'nosuch'"),
        (["rm", "done"], "nothing was removed: there is no terminal to ask on. --dry-run shows the runs, --yes removes"),
        (["prune"], "prune: which runs? --older 30d: those that ended 30 days ago; --keep 20: all but the newest 20."),
        (["prune", "--keep", "0"], "nothing was removed: there is no terminal to ask on."),
        (["prune", "--keep", "-1"], "--keep -1: 0 or more is needed."),
        (["prune", "--older", "30"], "--older '30': write a duration with its unit, such as 30s or 30m, or a date such as"),
        (["prune", "--older", "1d", "--state", "running"], "--state 'running': no such state. Allowed: succeeded, failed,"),
        (["list", "--state", "fialed"], "--state 'fialed': no such state (did you mean 'failed'?). Allowed: queued, running"),
        (["list", "--state", "failed,"], "--state '': no such state. Allowed: queued, running, succeeded"),
        (["list", "--since", "yesterday"], "--since 'yesterday': write a duration with its unit, such as 90s, 30m, 2h or 3d, or"),
        (["list", "--since", "2026-02-30"], "--since 2026-02-30: there is no such date."),
        (["wait", "done", "--timeout", "60"], "--timeout '60': write a duration with its unit, such as 60s or 60m."),
        (["cancel"], "cancel: no run is queued or running."),
        (["resume"], "resume: no run was stopped, was lost, or failed by no fault of its program."),
        (["status", "a", "b"], "unrecognized arguments: b"),
        (["list", "--nosuch"], "unrecognized arguments: --nosuch"),
        (["logs", "mrpc-lr3e-5", "--rank", "2"], "--rank 2: the ranks of mrpc-lr3e-5 are 0 to 1."),
        (["logs", "mrpc-lr3e-5", "--rank", "-1"], "--rank -1: the ranks of mrpc-lr3e-5 are 0 to 1."),
        (["logs", "mrpc-lr3e-5", "--rank", "0", "--rank", "1"], "--rank is given twice."),
        (["cancel", "nosuch"], "there is no run 'nosuch'"),
        (["resume", "nosuch"], "there is no run 'nosuch'"),
        (["resume", "done"], "run 'done' has succeeded; there is nothing to resume. Another --name starts a new one."),
        (["--name", "done", "script.py"], "run 'done' exists already in"),
        (["doctor", "--cluster", "nosuch"], "--cluster 'nosuch': no such profile"),
        (["doctor", "--backend", "nosuch"], "--backend 'nosuch': no such backend"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_nothing_is_sent(folder: Path, launch: Launch, argv: list[str], words: str) -> None:
    leave_run(folder, "mrpc-lr3e-5")
    leave_run(folder, "done", State.SUCCEEDED)
    status, out, err = launch(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("launch: ")
    assert words in err
    assert "Traceback" not in err
    assert sorted(p.name for p in folder.glob("runs/*")) == [".gitignore", "done", "mrpc-lr3e-5"]
    status, out, err = launch(argv[0], "--json", *argv[1:]) if argv[0] in COMMANDS else launch("--json", *argv)
    assert (status, err) == (2, "")
    assert words in json.loads(out)["error"]
    assert json.loads(out)["kind"] == "bad request"


@pytest.mark.parametrize("backend", ["local", "slurm", "ray"])
def test_a_hostile_run_name_is_refused(folder: Path, launch: Launch, backend: str) -> None:
    for name in (*HOSTILE, "", ".", "..", "-x", "x" * 101, "%j"):
        status, _, err = launch("--backend", backend, f"--name={name}", "script.py")
        assert status == 2
        assert f"--name {name!r}: a run name is up to 100 letters, digits" in err
    assert sorted(p.name for p in folder.parent.rglob("*")) == [
        "cli_broken.py",
        "cli_module.py",
        "project",
        "script.py",
    ]


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume"])
def test_a_hostile_name_of_a_run_is_an_unknown_run(launch: Launch, command: str) -> None:
    for name in (*HOSTILE, "", "..", "/", "/etc"):
        status, _, err = launch(command, "--", name)
        assert (status, f"there is no run {name!r}" in err) == (2, True)


@pytest.mark.parametrize(
    ("argv", "target", "args"),
    [
        ([], RunSpec.target, ()),
        (["--gpus", "8"], RunSpec.target, ()),
        (["--", "--model", "x", "--gpus", "2"], RunSpec.target, ("--model", "x", "--gpus", "2")),
        (["--gpus", "8", "--", "-a"], RunSpec.target, ("-a",)),
        (["--gpus", "8", "--", "a", "-b"], "-- a", ("-b",)),
        (["s.py", "--gpus", "2", "--json"], "s.py", ("--gpus", "2", "--json")),
        (["s.py", "--", "--x"], "s.py", ("--x",)),
        (["--gpus=8", "s.py"], "s.py", ()),
        (["m:f", "--name", "a b"], "m:f", ("--name", "a b")),
        (["-m", "pkg.mod", "--gpus", "2"], "-m pkg.mod", ("--gpus", "2")),
        (["--name", "x", "-m", "mod"], "-m mod", ()),
        (["--json", "s.py", "list"], "s.py", ("list",)),
        (["--name", "list", "s.py"], "s.py", ()),
        *((["s.py", word], "s.py", (word,)) for word in HOSTILE),
        (["s.py", ""], "s.py", ("",)),
    ],
)
def test_what_belongs_to_whom(argv: Sequence[str], target: str, args: tuple[str, ...]) -> None:
    spec, _ = parse_request(argv)
    assert (spec.target, spec.args) == (target, args)


def test_options_become_the_request() -> None:
    text = "--backend slurm --cluster big --tpus 8 --nodes 2 --accelerator v5e --topology 2x4 --name n --time 2h"
    spec, options = parse_request([*text.split(), "--max-restarts=0", "--dry-run", "--detach", "--json", "m:f"])
    assert spec == RunSpec(
        "m:f", (), "slurm", "big", None, 8, None, 2, "v5e", "2x4", name="n", time="2h", max_restarts=0
    )
    assert (options.dry_run, options.detach, options.json) == (True, True, True)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: " ".join(c) or "launch")
def test_every_command_has_help(launch: Launch, command: list[str]) -> None:
    for flag in ("--help", "-h"):
        status, out, err = launch(*command, flag)
        assert (status, err) == (0, "")
        assert out.startswith(f"usage: {' '.join(['launch', *command])}")
    if not command:
        assert all(name in out for name in COMMANDS)
        assert launch("--gpus", "2", "--help")[0] == 0


def test_the_flags_of_a_target_are_shown(folder: Path) -> None:
    (folder / "flags.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    lr: float = 1e-3  # how fast\n"
        "def main(ctx, config: C): ...\ndef plain(): ...\ndef reads(ctx): ...\n"
    )
    for function, words in (
        ("main", "--lr NUMBER  how fast"),
        ("plain", "no arguments"),
        ("reads", "a Context and reads"),
    ):
        done = subprocess.run([*COMMAND, f"flags:{function}", "--help"], capture_output=True, text=True, check=True)
        assert words in done.stdout


def test_exit_statuses_follow_the_run(folder: Path, launch: Launch) -> None:
    """`status` succeeds for a failed run; the output has its state."""
    for state in (State.SUCCEEDED, State.FAILED, State.STOPPED):
        leave_run(folder, state.value, state)
        status, out, _ = launch("status", state.value)
        assert (status, out.splitlines()[0]) == (0, f"{state.value}: {state.value}")
        assert json.loads(launch("status", state.value, "--json")[1])["state"] == state.value
        assert json.loads(launch("cancel", state.value, "--json")[1])["state"] == state.value
    assert [run["state"] for run in json.loads(launch("list", "--json")[1])].count("stopped") == 1
    assert launch("logs", "failed") == (0, "", "")
    assert launch("list", "--runs", "nosuch") == (0, "no runs in nosuch\n", "")
    assert json.loads(launch("clusters", "--json")[1])[-1]["where"] == "shipped"


def test_a_run_that_cannot_be_read_does_not_hide_the_others(folder: Path, launch: Launch) -> None:
    leave_run(folder, "good", State.SUCCEEDED)
    for name, plan in (("torn", '{"name": '), ("newer", '{"from": "another version"}')):
        leave_run(folder, name).plan_file.write_text(plan)
        assert launch("status", name)[0] == 2
    status, out, err = launch("list")
    assert (status, err, out.count("unreadable: "), out.count("succeeded")) == (0, "", 2, 1)
    listed = {run["name"]: run["state"] for run in json.loads(launch("list", "--json")[1])}
    assert listed == {"good": "succeeded", "torn": "unknown", "newer": "unknown"}


def test_a_run_of_another_machine_is_not_cancelled_from_here(folder: Path, launch: Launch) -> None:
    leave_run(folder, "far")
    assert launch("cancel", "far", "--now") == (
        1, "", "launch: the run is supervised by a process on elsewhere; cancel it on that machine.\n",
    )  # fmt: skip


def test_json_after_the_target_is_the_targets(launch: Launch) -> None:
    status, out, err = launch("nosuch.py", "--json")
    assert (status, out) == (2, "")
    assert "no such script" in err


def test_a_profile_that_cannot_be_used_is_listed_and_says_why(folder: Path, launch: Launch) -> None:
    (folder / "cluster_configs").mkdir()
    (folder / "cluster_configs/bad.toml").write_text("backend = 'local'\ncolour = 1")
    status, out, _ = launch("clusters")
    assert status == 0
    assert "unknown key 'colour'" in out
    assert "looked in: " in out


@pytest.mark.parametrize("runs", ["script.py", "script.py/deeper", "/proc/runs", "/dev/null"])
def test_a_runs_folder_that_cannot_be_written(folder: Path, launch: Launch, runs: str) -> None:
    (folder / "x.toml").write_text(f"backend = 'local'\nruns = {runs!r}")
    status, _, err = launch("--cluster", "./x.toml", "--name", "n", "script.py")
    assert status == 2
    assert "cannot be written" in err or "cannot be made" in err


def test_a_runs_folder_that_the_nodes_do_not_share(folder: Path, launch: Launch) -> None:
    (folder / "x.toml").write_text("backend = 'local'\nshared = ['/scratch', '/home']")
    status, _, err = launch("--cluster", "./x.toml", "script.py")
    assert status == 2
    assert (
        "is not shared by the nodes of cluster 'x': its profile names /scratch, /home. Start from there, or set" in err
    )


def test_a_project_with_a_package_of_our_name(folder: Path, launch: Launch) -> None:
    (folder / "training").mkdir()
    (folder / "training/__init__.py").touch()
    assert launch("--dry-run", "script.py")[0] == 0, "a script sees its own"
    for target in ("training.mine:main", "cli_module:function"):
        status, _, err = launch("--dry-run", target)
        assert status == 2
        assert (
            f"two packages are called 'training': yours at {folder}/training/__init__.py and this toolkit's at" in err
        )


def test_a_script_that_git_ignores_is_sent(folder: Path, launch: Launch) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    (folder / ".gitignore").write_text("script.py\n")
    status, _, err = launch("--name", "n", "script.py")
    assert status == 0, err
    assert (folder / "runs/n/code/script.py").read_text() == (folder / "script.py").read_text()


def test_hostile_names_of_scripts_and_flags_really_run(folder: Path, launch: Launch) -> None:
    """From the command line to the ranks and back, through the snapshot, the plan, the agent and the forkserver."""
    script = folder / "sub dir'\"" / "a b;$(touch pwned)\n`touch pwned`.py"
    script.parent.mkdir()
    script.write_text((folder / "script.py").read_text())
    (folder / "x.toml").write_text("backend = 'local'\nruns = \"r u'ns\"\n[environment]\nHOSTILE = '$(touch pwned)'")
    name = os.path.relpath(script)
    status, _, err = launch("--cluster", "./x.toml", "--cpus", "2", "--name", "n", "--json", name, *HOSTILE)
    assert (status, err.count("['a b',")) == (0, 1)
    for rank in range(2):
        assert (folder / "r u'ns/n/logs/1" / f"{rank}.log").read_text() == f"{HOSTILE!r}\n"
    assert not list(folder.parent.rglob("*pwned"))


SRUN = "#!/bin/sh\nfor each; do printf '%s\\n' \"[$each]\"; done >> srun.args\n"


def test_hostile_values_of_a_profile_never_reach_a_shell(folder: Path, launch: Launch, tmp_path: Path) -> None:
    """bash runs the sbatch script, with an srun that prints its arguments."""
    hostile = "$(touch pwned) `touch pwned` ; touch pwned 'a\" \\"
    value = json.dumps(hostile)
    (folder / "x.toml").write_text(
        f"backend = 'slurm'\nnodes = 2\npython = 'py$(touch pwned) ; touch pwned'\nruns = 'a b;`touch pwned`'\n"
        f"[node]\ngpus = 8\ncpus = 8\n[environment]\nA = {value}\n[slurm]\naccount = {value}\npartition = {value}\n"
        f"qos = {value}\nreservation = {value}\nconstraint = {value}\nexclude = {value}\nnodelist = {value}\n"
        f"srun_args = [{value}]\nsbatch = {{mail-user = {value}, requeue = false}}\n"
    )
    status, out, _ = launch("--cluster", "./x.toml", "--gpus", "16", "--name", "n", "--dry-run", "--json", "script.py")
    assert status == 0
    sent: str = json.loads(out)["sent"]
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", sent[sent.index("#!/bin/bash") :]], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    given = (folder / "srun.args").read_text()
    assert f"[{hostile}]" in given
    assert "[py$(touch]\n[pwned)]\n[;]\n[touch]\n[pwned]\n" in given
    assert not list(tmp_path.rglob("pwned"))
    assert "--requeue" not in sent.split("#!/bin/bash")[1]


def test_a_python_command_that_is_no_command(folder: Path, launch: Launch) -> None:
    (folder / "x.toml").write_text("backend = 'slurm'\nnodes = 1\npython = \"a'b\"\nnode = {gpus = 1, cpus = 1}")
    status, _, err = launch("--cluster", "./x.toml", "--dry-run", "script.py")
    assert (status, "python = \"a'b\" in the cluster's profile: No closing quotation." in err) == (2, True)


def test_a_dry_run_sends_and_leaves_nothing(folder: Path, launch: Launch) -> None:
    status, out, _ = launch("--dry-run", "--json", "--cpus", "2", "--name", "n", "script.py", "a b")
    told: dict[str, Any] = json.loads(out)
    assert (status, told["plan"]["target"]["args"]) == (0, ["a b"])
    assert "rank 1: script" in told["sent"]
    assert not (folder / "runs").exists()
