"""A single local rank in the foreground, in a real pseudo-terminal and behind pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.launcher.engines import Project, ranks_of, until

PDB = r"\(Pdb\) "

DEBUGGED = """
x = 41
breakpoint()
x = x + 1
y = 2
print("the end", x)
"""


@contextmanager
def terminal(project: Project, source: str, *words: str, options: tuple[str, ...] = ("--cpus", "1")) -> Iterator[Any]:
    """Run a script in a terminal of 33 lines and 101 columns, as ``run``."""
    (project.folder / "program.py").write_text(source)
    command = ["-P", "-m", "launcher", *options, "--name", "run", "program.py", *words]
    child = pexpect.spawn(
        project.python, command, cwd=str(project.folder), dimensions=(33, 101), encoding="utf-8", timeout=60
    )
    child.delaybeforesend = None
    try:
        yield child
    finally:
        child.close(force=True)


def ended(child: Any) -> int | None:
    """Wait for the end of the command; return its exit status."""
    child.expect(pexpect.EOF)
    child.wait()
    return child.exitstatus  # type: ignore[no-any-return]


def echoes(child: Any) -> bool:
    """Whether the user's terminal echoes and delivers lines, as before the run."""
    flags = termios.tcgetattr(child.child_fd)[3]
    return bool(flags & termios.ECHO and flags & termios.ICANON and flags & termios.ISIG)


def log_of(project: Project, attempt: int = 1) -> str:
    return (project.folder / "runs" / "run" / "logs" / str(attempt) / "0.log").read_text()


def state_of(project: Project) -> Any:
    return json.loads((project.folder / "runs" / "run" / "result.json").read_text())["state"]


def interrupt_prompt(project: Project, child: Any) -> None:
    """Type Ctrl-C once the program waits for input; Python itself loses a signal between the prompt and the read."""
    [pid] = pids_with(project, "rank")
    until(lambda: process_state(pid) == "S", "the program waits")
    child.sendcontrol("c")


def test_pdb_steps_prints_and_continues(local_project: Project) -> None:
    with terminal(local_project, DEBUGGED) as child:
        child.expect(PDB)
        child.sendline("n")
        child.expect(PDB)
        child.sendline("p x")
        child.expect("42")
        child.expect(PDB)
        child.sendline("c")
        child.expect("the end 42")
        assert ended(child) == 0
        assert echoes(child)
    assert "(Pdb) p x\n42\n" in log_of(local_project)
    assert "\r" not in log_of(local_project)


def test_ctrl_c_at_a_prompt_of_pdb_and_after_continue_is_for_pdb(local_project: Project) -> None:
    loop = "import time\nbreakpoint()\nprint('looping')\ntimes = 0\nwhile times < 6000:\n    times += 1\n    time.sleep(0.01)\n"
    with terminal(local_project, loop) as child:
        child.expect(PDB)
        interrupt_prompt(local_project, child)
        child.expect("--KeyboardInterrupt--")
        child.expect(PDB)
        child.sendline("c")
        child.expect("looping\r\n")
        child.sendcontrol("c")
        child.expect("Program interrupted")
        child.expect(PDB)
        child.sendline("times = 10000")
        child.expect(PDB)
        child.sendline("c")
        assert ended(child) == 0
    assert state_of(local_project) == "succeeded"


def test_quitting_pdb_fails_as_under_python(local_project: Project) -> None:
    with terminal(local_project, DEBUGGED) as child:
        child.expect(PDB)
        child.sendline("q")
        child.expect("bdb.BdbQuit")
        assert ended(child) == 1


READS = """
import getpass, os, readline, sys
readline.add_history("earlier")
print([stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)], os.get_terminal_size(), os.ttyname(0) == os.ttyname(1))
name = input("name? ")
secret = getpass.getpass("secret? ")
print("read", name, len(secret))
"""


def test_input_getpass_history_and_the_size_of_the_window(local_project: Project) -> None:
    with terminal(local_project, READS) as child:
        child.expect_exact("[True, True, True] os.terminal_size(columns=101, lines=33) True")
        child.expect(r"name\? ")
        child.send("\x1b[A")  # the line before, by readline
        child.expect("earlier")
        child.sendline("-Zoë")
        child.expect(r"secret\? ")
        child.sendline("hidden")
        child.expect("read earlier-Zoë 6")
        assert ended(child) == 0
    assert "hidden" not in log_of(local_project)


def test_the_program_follows_the_size_of_the_window(local_project: Project) -> None:
    resized = """
import os, signal
signal.signal(signal.SIGWINCH, lambda *_: os.write(1, str(os.get_terminal_size()).encode()))
print("ready", flush=True)
while input() != "end": pass
"""
    with terminal(local_project, resized) as child:
        child.expect("ready")
        child.setwinsize(20, 55)
        child.expect_exact("os.terminal_size(columns=55, lines=20)")
        child.sendline("end")
        assert ended(child) == 0


def test_a_bar_of_tqdm_is_drawn_in_the_width_of_the_window(local_project: Project) -> None:
    bar = "import tqdm\nfor _ in tqdm.tqdm(range(3), mininterval=0, dynamic_ncols=True): input('go? ')\n"
    with terminal(local_project, bar) as child:
        for done in (0, 1, 2):
            child.expect(rf"\r( *\S+\|[^|]*\| {done}/3 \[[^]]*\])")
            assert len(child.match[1].rstrip()) < 102
            child.expect(r"go\? ")
            child.sendline("")
        assert ended(child) == 0


WAITS = """
import signal, sys, time
def saves(*_):
    print("saving", flush=True)
    {after}
signal.signal(signal.SIGTERM, saves)
print("working", flush=True)
while True:
    time.sleep(0.01)
"""


def test_ctrl_c_once_asks_the_program_to_stop(local_project: Project) -> None:
    with terminal(local_project, WAITS.format(after="sys.exit(0)")) as child:
        child.expect("working")
        child.sendcontrol("c")
        child.expect("Ctrl-C again ends at once")
        child.expect("saving")
        assert ended(child) == 3
        assert echoes(child)
    assert state_of(local_project) == "stopped"
    assert "saving" in log_of(local_project)


@pytest.mark.parametrize("keys", ["\x03", "\x1c"], ids=["ctrl-c", "ctrl-backslash"])
def test_ctrl_c_twice_or_ctrl_backslash_ends_now(local_project: Project, keys: str) -> None:
    with terminal(local_project, WAITS.format(after="pass")) as child:
        child.expect("working")
        if keys == "\x03":
            child.send(keys)
            child.expect("saving")
        child.send(keys)
        assert ended(child) == 3
        assert echoes(child)
    assert state_of(local_project) == "stopped"


def test_ctrl_c_at_a_prompt_of_input_interrupts_the_program(local_project: Project) -> None:
    asks = "try:\n    input('name? ')\nexcept KeyboardInterrupt:\n    print('caught')\ninput('again? ')\n"
    with terminal(local_project, asks) as child:
        child.expect(r"name\? ")
        interrupt_prompt(local_project, child)
        child.expect("caught")
        child.expect(r"again\? ")
        interrupt_prompt(local_project, child)
        assert ended(child) == 3
    assert state_of(local_project) == "stopped"


def test_a_program_that_reads_keys_gets_ctrl_c_as_a_byte(local_project: Project) -> None:
    keys = "import os, tty\ntty.setraw(0)\nprint('ready', flush=True)\nprint(os.read(0, 1), os.read(0, 1))\n"
    with terminal(local_project, keys) as child:
        child.expect("ready")
        child.send("\x03\x1a")
        child.expect_exact(r"b'\x03' b'\x1a'")
        assert ended(child) == 0


def test_ctrl_z_suspends_the_program_and_fg_continues_it(local_project: Project) -> None:
    (local_project.folder / "program.py").write_text("print('one')\nprint(input('more? '))\n")
    child = pexpect.spawn("bash", ["--norc", "-i"], cwd=str(local_project.folder), encoding="utf-8", timeout=60)
    try:
        child.sendline(f"PS1='shell> '; {local_project.python} -P -m launcher --cpus 1 --name run program.py")
        child.expect(r"more\? ")
        [pid] = pids_with(local_project, "rank")
        child.sendcontrol("z")
        child.expect("Stopped")
        child.expect("shell> ")
        until(lambda: process_state(pid) == "T", "the rank is suspended")
        child.sendline("echo the-shell-reads-$((40 + 2))")
        child.expect("the-shell-reads-42")
        child.sendline("fg")
        until(lambda: process_state(pid) != "T", "the rank continues")
        child.sendline("typed")
        child.expect("typed.*typed")
        child.expect("succeeded")
        child.expect("shell> ")
    finally:
        child.close(force=True)


def test_bg_continues_the_program_without_the_keyboard(local_project: Project) -> None:
    source = """
import os, time
while not os.path.exists("go"):
    print("tick", flush=True)
    time.sleep(0.1)
print(input("more? "))
"""
    (local_project.folder / "program.py").write_text(source)
    child = pexpect.spawn("bash", ["--norc", "-i"], cwd=str(local_project.folder), encoding="utf-8", timeout=60)
    try:
        child.sendline(f"PS1='shell> '; {local_project.python} -P -m launcher --cpus 1 --name run program.py")
        child.expect("tick")
        child.sendcontrol("z")
        child.expect("Stopped")
        child.expect("shell> ")
        child.sendline("bg")
        child.expect("tick")
        child.sendline("echo the-shell-reads-$((40 + 2))")
        child.expect("the-shell-reads-42")
        (local_project.folder / "go").touch()
        child.expect(r"more\? ")
        child.sendline("fg")
        child.expect("program.py\r\n")
        child.sendline("typed")
        child.expect("typed.*typed")
        child.expect("succeeded")
    finally:
        child.close(force=True)


def pids_with(project: Project, word: str) -> list[int]:
    """The processes of the run `run` that have `word` among their arguments."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(project.folder / "runs" / "run").encode() in words and word.encode() in words:
            found.append(int(name))
    return found


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_restart_keeps_the_terminal(local_project: Project) -> None:
    crashes = """
import os, signal
print(input(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}? "))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with terminal(local_project, crashes) as child:
        child.expect(r"attempt 0\? ")
        child.sendline("first")
        child.expect("begins anew unless it loads a checkpoint of its own")
        child.expect(r"attempt 1\? ")
        child.sendline("second")
        child.expect(r"(\r\n|\x1b\[K)second")  # behind the echo, which the line of progress may have followed
        assert ended(child) == 0
    assert "first" in log_of(local_project, 1)
    assert "second" in log_of(local_project, 2)


ASKS = "import sys\nprint('out', flush=True)\ntry:\n    print(input('name? '))\nexcept EOFError:\n    print('end of input')\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_run_goes_on_without_its_terminal(local_project: Project, number: signal.Signals) -> None:
    with terminal(local_project, ASKS) as child:
        child.expect(r"name\? ")
        child.kill(number)
        until(lambda: (local_project.folder / "runs" / "run" / "result.json").exists(), "the run ends")
        child.expect(pexpect.EOF)
        assert number == signal.SIGKILL or echoes(child)  # nobody can act on SIGKILL
    assert state_of(local_project) == "succeeded"
    assert "end of input" in log_of(local_project)


def test_a_closed_terminal_leaves_the_run(local_project: Project) -> None:
    with terminal(local_project, ASKS) as child:
        child.expect(r"name\? ")
        child.close(force=False)
        until(lambda: (local_project.folder / "runs" / "run" / "result.json").exists(), "the run ends")
    assert "end of input" in log_of(local_project)


def test_sigterm_stops_the_run_and_restores_the_terminal(local_project: Project) -> None:
    with terminal(local_project, WAITS.format(after="sys.exit(0)")) as child:
        child.expect("working")
        child.kill(signal.SIGTERM)
        assert ended(child) == 3
        assert echoes(child)


def test_a_cancel_from_another_shell_restores_the_terminal(local_project: Project) -> None:
    with terminal(local_project, WAITS.format(after="sys.exit(0)")) as child:
        child.expect("working")
        local_project.call("cancel", "run")
        assert ended(child) == 3
        assert echoes(child)


# ---- pipes and files -------------------------------------------------------------------------------------------------

COPIES = "import sys\nprint('read', repr(sys.stdin.read()), [s.isatty() for s in (sys.stdin, sys.stdout)])\n"


def in_shell(project: Project, line: str, source: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which LAUNCH is the command with one rank and the name of the run."""
    (project.folder / "program.py").write_text(source)
    line = line.replace("LAUNCH", f"{project.python} -P -m launcher --name run")
    return subprocess.run(
        ["bash", "-c", line], cwd=project.folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_pipe_and_a_file_reach_a_single_rank(local_project: Project) -> None:
    done = in_shell(local_project, "echo x | LAUNCH program.py", COPIES)
    assert "read 'x\\n' [False, False]" in done.stdout.splitlines()
    (local_project.folder / "data.txt").write_text("of the file")
    done = in_shell(local_project, "LAUNCH-2 program.py < data.txt; echo $?", COPIES)
    assert "read 'of the file' [False, False]" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "0"
    done = in_shell(local_project, "LAUNCH-3 program.py <&-", "import sys\nprint(sys.stdin.read() == '')")
    assert "True" in done.stdout.splitlines()


def test_a_pipe_is_what_torchrun_gives_a_single_rank(local_project: Project) -> None:
    reads = """
import os, stat, sys
kind = os.fstat(0).st_mode
print("found", stat.S_ISFIFO(kind), sys.stdin.readline(), os.read(0, 1), sys.stdin.encoding, sys.stdin.errors)
"""
    (local_project.folder / "program.py").write_text(reads)
    torchrun = f"{local_project.python} -m torch.distributed.run --nproc-per-node 1 program.py"
    expected = subprocess.run(
        ["bash", "-c", f"printf 'one\\ntwo\\n' | {torchrun}"], cwd=local_project.folder, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    done = in_shell(local_project, "printf 'one\\ntwo\\n' | LAUNCH --cpus 1 program.py", reads)
    found = [line for line in done.stdout.splitlines() if line.startswith("found")]
    assert found == [line for line in expected.stdout.splitlines() if line.startswith("found")] != []


def test_a_pipe_reaches_a_rank_whose_output_is_a_terminal(local_project: Project) -> None:
    (local_project.folder / "program.py").write_text(COPIES)
    line = f"echo x | {local_project.python} -P -m launcher --name run program.py"
    child = pexpect.spawn("bash", ["-c", line], cwd=str(local_project.folder), encoding="utf-8", timeout=60)
    child.expect_exact(r"read 'x\n' [False, True]")
    assert ended(child) == 0


def test_the_rest_of_a_pipe_is_read_after_a_restart(local_project: Project) -> None:
    reads = """
import os, signal
print("line", os.read(0, 2), flush=True)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = in_shell(local_project, "printf 1234 | LAUNCH program.py", reads)
    assert [line for line in done.stdout.splitlines() if line.startswith("line")] == ["line b'12'", "line b'34'"]


def test_several_ranks_read_nothing(local_project: Project) -> None:
    reads = "import os, sys\nprint('rank', os.environ['RANK'], repr(sys.stdin.read()))\n"
    done = in_shell(local_project, "echo x | LAUNCH --cpus 2 program.py", reads)
    assert done.returncode == 0
    assert local_project.logs("run") == ["[0] rank 0 ''", "[1] rank 1 ''"]
    assert "stdin" not in done.stdout + done.stderr


def test_a_reader_that_goes_away_stops_the_run(local_project: Project) -> None:
    prints = "import time\nwhile True:\n    print('line', flush=True)\n    time.sleep(0.01)\n"
    done = in_shell(local_project, "LAUNCH program.py | head -5; echo ${PIPESTATUS[0]}", prints)
    assert done.stdout.splitlines()[-1] == "3"
    assert "Traceback" not in done.stderr
    assert state_of(local_project) == "stopped"
    assert not ranks_of(local_project.folder / "runs" / "run" / "logs" / "1")


def test_the_keyboard_reaches_a_rank_whose_output_is_a_pipe(local_project: Project) -> None:
    (local_project.folder / "program.py").write_text("print('ready')\nprint('read', input(), flush=True)\n")
    line = f"{local_project.python} -P -m launcher --name run program.py | cat"
    child = pexpect.spawn("bash", ["-c", line], cwd=str(local_project.folder), encoding="utf-8", timeout=60)
    child.expect("ready")
    child.sendline("words")
    child.expect("read words")
    assert ended(child) == 0


def test_a_function_and_the_next_attempt_of_resume_have_the_terminal(local_project: Project) -> None:
    source = "def main(ctx):\n    ctx.log(1, loss=0.5)\n    print('read', input('name? '))\n    return {'n': 1}\n"
    (local_project.folder / "function.py").write_text(source)
    words = ["-P", "-m", "launcher", "--cpus", "1", "--name", "run", "function:main"]
    child = pexpect.spawn(local_project.python, words, cwd=str(local_project.folder), encoding="utf-8", timeout=60)
    child.expect(r"name\? ")
    interrupt_prompt(local_project, child)
    assert ended(child) == 3
    again = ["-P", "-m", "launcher", "resume", "run"]
    child = pexpect.spawn(local_project.python, again, cwd=str(local_project.folder), encoding="utf-8", timeout=60)
    child.expect(r"name\? ")
    child.sendline("Ada")
    child.expect("read Ada")
    assert ended(child) == 0


def test_the_bundled_job_which_is_forked_can_be_stopped_at_the_terminal(local_project: Project) -> None:
    words = ["-P", "-m", "launcher", "--cpus", "1", "--name", "run", "--", "--epochs", "500"]
    child = pexpect.spawn(local_project.python, words, cwd=str(local_project.folder), encoding="utf-8", timeout=120)
    child.expect("step/s")
    child.sendcontrol("c")
    child.expect("stopping")
    assert ended(child) == 3
    assert echoes(child)
