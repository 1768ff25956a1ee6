"""Why a rank ended: the kind of its exception, or the cause of an abort in its log."""

from __future__ import annotations

import builtins
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.lifecycle.exit_status import advice, cause_in, classify, headline
from launcher.lifecycle.policy import ADVICE, RULES, Action, Outcome, Retry, decide
from launcher.lifecycle.recovery import abort_causes
from launcher.lifecycle.run_dir import RunDir
from tests.launcher.engines import Project
from tests.launcher.error_texts import NCCL, TEXTS
from training.errors import ConfigError, DeviceError, ReplicaError


class OutOfMemoryError(RuntimeError): ...


class DistBackendError(RuntimeError): ...


def error_of(name: str, text: str) -> BaseException:
    """An exception of a class with this name; library exceptions are recognised by name."""
    if text.startswith("[Errno "):
        number, _, words = text.removeprefix("[Errno ").partition("] ")
        return OSError(int(number), words)
    kind = getattr(builtins, name, None) or type(name, (RuntimeError if "Error" in name else Exception,), {})
    made = kind(text)
    assert isinstance(made, BaseException)
    return made


@pytest.mark.parametrize(("name", "text", "kind", "source"), TEXTS, ids=[f"{n} {t[:50]}" for n, t, _, _ in TEXTS])
def test_texts_of_drivers_and_libraries(name: str, text: str, kind: str, source: str) -> None:
    assert classify(error_of(name, text)) == kind, source
    wrapped = ValueError("step 7 failed")
    wrapped.__cause__ = error_of(name, text)
    assert classify(wrapped) == kind, "an error that was raised from it"


def test_the_table_is_large_and_names_its_sources() -> None:
    assert len({text for _, text, _, _ in TEXTS}) == len(TEXTS) >= 40
    assert all(source for *_, source in TEXTS)
    assert {kind for _, _, kind, _ in TEXTS} == {
        *("out of memory", "killed", "user error", "device", "communication", "disk full")
    }


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out of memory"),
        (OutOfMemoryError("CUDA out of memory"), "out of memory"),  # the class of torch.cuda is recognised by its name
        (OutOfMemoryError("no sign at all"), "out of memory"),
        (OSError(28, "No space left on device"), "disk full"),
        (OSError(122, "Disk quota exceeded"), "disk full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (OSError(2, "No such file"), "user error"),
        (OSError(30, "Read-only file system"), "storage"),
        (OSError(116, "Stale file handle"), "storage"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "user error"),
        (DistBackendError("NCCL error"), "communication"),
        (DistBackendError("no sign at all"), "communication"),
        (ConnectionResetError(), "communication"),
        (BrokenPipeError(), "communication"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "communication"),
        (RuntimeError("NCCL communicator was aborted"), "communication"),
        (RuntimeError("shape mismatch"), "user error"),
        (ValueError("Broken pipe"), "user error"),
        (SystemExit(3), "user error"),
        (ConfigError("--lr: no"), "bad request"),
        (DeviceError("no GPU"), "device"),
        (ReplicaError("rank 1 differs"), "diverged"),
    ],
)
def test_the_kind_of_an_exception(error: BaseException, kind: str) -> None:
    assert classify(error) == kind
    assert kind in RULES


def test_only_an_explicit_cause_counts() -> None:
    inner, outer = OSError(28, "No space left on device"), KeyError("x")
    outer.__context__ = inner
    assert classify(outer) == "user error", "it was raised while another was handled"
    outer.__cause__ = inner
    assert classify(outer) == "disk full"
    outer.__cause__ = ConfigError("--lr: no")
    assert classify(outer) == "user error", "its text is not for the person at the keyboard"
    outer.__cause__ = ConnectionRefusedError("https://data.example")
    assert classify(outer) == "user error", "a download that fails is no rank that was lost"
    circle = KeyError("a circle")
    circle.__cause__, outer.__cause__ = outer, circle
    assert classify(outer) == "user error"


def test_a_rank_that_was_given_no_gpu_and_wants_one_is_wrong() -> None:
    error = AssertionError("Torch not compiled with CUDA enabled")
    assert (classify(error, "cuda"), classify(error, "cpu")) == ("device", "user error")
    assert classify(RuntimeError("CUDA out of memory"), "cpu") == "out of memory"


def test_what_the_installed_torch_says_of_a_missing_gpu() -> None:
    """The texts of torch itself: a CPU build, or a CUDA build without a visible GPU."""
    code = "import torch; torch.zeros(1).cuda()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    name, _, text = done.stderr.strip().splitlines()[-1].partition(": ")
    assert classify(error_of(name, text)) == "device"


def test_what_the_installed_torch_says_of_memory() -> None:
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert classify(raised.value) == "out of memory"
    assert "memory of the node" in advice("out of memory", str(raised.value))


def test_advice_that_fits_the_text_goes_before_that_of_the_kind() -> None:
    texts = {text: kind for _, text, kind, _ in TEXTS}
    duplicate = next(text for text in texts if "Duplicate GPU" in text)
    record = {"kind": "user error", "rank": 1, "host": "n1", "type": "DistBackendError", "message": duplicate}
    action, failure = decide(Outcome({1: 1}, [record]), 3)
    assert failure is not None
    assert (action, failure.advice) == (Action.FAIL, advice("user error", duplicate))
    assert "MIG" in failure.advice
    assert advice("out of memory", duplicate) == "", "it is of another kind"
    assert all(advice(kind, text) == "" or kind in ADVICE for text, kind in texts.items())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("one\ntwo", "one"),
        (
            f"{NCCL}x\nncclSystemError: y\nLast error:\nCall to connect failed\nException raised from z\nframe #0: w",
            f"{NCCL}x ... Last error: Call to connect failed",
        ),
        (f"{NCCL}x\nncclSystemError: y\nLast error:\n", f"{NCCL}x"),
        ("NCCL error\nLast error: on the same line", "NCCL error ... Last error: on the same line"),
    ],
)
def test_the_line_of_an_error_that_holds_its_cause(text: str, line: str) -> None:
    assert headline(text) == line


# ---- aborts -------------------------------------------------------------------------------------------------------

WATCHDOG = (
    "[rank1]:[E1126 10:00:00.1 ProcessGroupNCCL.cpp:685] [Rank 1] Watchdog caught collective operation timeout: W"
)
STACK = """\
Exception raised from checkTimeout at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:632 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x7f83f296c1b6 in libc10.so)

Fatal Python error: Aborted

Thread 0x00007f (most recent call first):
  File "train.py", line 9 in step
"""
THROWN = "terminate called after throwing an instance of 'c10::DistBackendError'\n  what():  "
PG = "[PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception: "


@pytest.mark.parametrize(
    ("log", "kind", "words"),
    [
        (f"{WATCHDOG}\n{THROWN}{PG}[Rank 1] Watchdog caught collective operation timeout: W\n{STACK}", "communication", "Watc"),
        (f"step 1\n{THROWN}{PG}CUDA error: uncorrectable ECC error encountered\nCUDA k\n\n{STACK}", "device", "ECC"),
        (f"{THROWN}{PG}CUDA error: an illegal memory access was encountered\n{STACK}", "user error", "illegal"),
        (f"{THROWN}{PG}CUDA error: out of memory\n{STACK}", "out of memory", "out of memory"),
        (f"{THROWN}{PG}NCCL error: x\nncclUnhandledCudaError: y\nLast error:\nCuda failure 2 'out of memory'\n{STACK}",
         "out of memory", "Last error:"),
        ("terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n", "out of memory", "bad"),
        ("terminate called after throwing an instance of 'std::runtime_error'\n  what():  my own\n", "user error", "my own"),
        (f"{WATCHDOG}\n[rank1]:[E ProcessGroupNCCL.cpp:1] To avoid data inconsistency, we are taking it down.\n{STACK}",
         "communication", "Watchdog"),
    ],
)  # fmt: skip
def test_the_cause_of_an_abort_is_read_from_the_log(tmp_path: Path, log: str, kind: str, words: str) -> None:
    run = RunDir(tmp_path)
    (run.logs / "2").mkdir(parents=True)
    run.log(2, 1).write_text(log)
    run.log(2, 0).write_text(log)
    found = abort_causes(run, 2, {0: -signal.SIGKILL, 1: -signal.SIGABRT, 2: -signal.SIGABRT, 3: 1})
    assert {rank: told for rank, (told, _) in found.items()} == {1: kind}, (
        "a rank that was killed did not abort by itself"
    )
    assert words in found[1][1]
    assert "frame #" not in found[1][1]
    action, failure = decide(Outcome({1: -6}, aborts=found), 3)
    assert failure is not None
    assert (failure.kind, failure.rank) == (kind, 1)
    assert failure.message.startswith("rank 1 was ended by SIGABRT: ")
    assert action is (Action.FAIL if RULES[kind].retry is Retry.NEVER else Action.RESTART)


@pytest.mark.parametrize(
    "log",
    [
        "",
        "step 1\n",
        STACK,
        "terminate called after throwing an instance of 'X'\n",
        "[rank0]:[I1126 ProcessGroupNCCL.cpp:835] NCCL watchdog\n",
        "  what():  \n",
    ],
)
def test_an_abort_that_says_nothing_is_a_killed_rank(log: str) -> None:
    assert cause_in(log.splitlines()) is None
    _, failure = decide(Outcome({1: -6}), 3)
    assert failure is not None
    assert (failure.kind, failure.message) == ("killed", "rank 1 was ended by SIGABRT")


def test_of_ranks_that_died_the_one_that_did_not_only_lose_its_peers_is_the_cause() -> None:
    echo = ("communication", "Watchdog caught")
    record = {"kind": "communication", "rank": 2, "host": "n1", "type": "DistBackendError", "message": "NCCL error"}
    for exits, aborts, kind, rank in (
        ({0: -6, 1: -9}, {0: echo}, "killed", 1),
        ({0: -6, 1: -6}, {0: echo, 1: ("device", "CUDA error: unknown error")}, "device", 1),
        ({0: -6, 1: -6}, {0: echo, 1: echo}, "communication", 0),
        ({0: -6, 1: -6}, {0: echo}, "killed", 1),
    ):
        _, failure = decide(Outcome(exits, aborts=aborts), 3)
        assert failure is not None
        assert (failure.kind, failure.rank) == (kind, rank)
    _, failure = decide(Outcome({0: -6, 2: 1}, [record], aborts={0: echo}), 3)
    assert failure is not None
    assert (failure.kind, failure.rank) == ("communication", 2)


ABORT = """
import ctypes, faulthandler, sys
faulthandler.enable(2)
library = ctypes.CDLL("libstdc++.so.6")
getattr(library, sys.argv[1])(*(word.encode() for word in sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("function", "words", "cause"),
    [
        ("_ZSt21__throw_runtime_errorPKc", "CUDA error: unknown error", ("device", "CUDA error: unknown error")),
        ("_ZSt17__throw_bad_allocv", None, ("out of memory", "std::bad_alloc")),
        ("_ZSt9terminatev", None, None),
    ],
)
def test_a_real_abort_of_c_plus_plus(
    tmp_path: Path, function: str, words: str | None, cause: tuple[str, str] | None
) -> None:
    """An uncaught C++ exception, as of NCCL's watchdog, followed by Python stacks."""
    run = RunDir(tmp_path)
    (run.logs / "1").mkdir(parents=True)
    with run.log(1, 0).open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", ABORT, function, *([words] if words else [])], stderr=log, check=False
        )
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in run.log(1, 0).read_text()
    assert abort_causes(run, 1, {0: done.returncode}) == ({0: cause} if cause else {})


ABORTS_IN_A_RANK = """
import ctypes
import os

if os.environ["RANK"] == "1":
    ctypes.CDLL("libstdc++.so.6")._ZSt21__throw_runtime_errorPKc(b"CUDA error: out of memory")
"""

MISMATCHED = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(8000 if dist.get_rank() else 4))
dist.all_reduce(torch.ones(1))
"""

DIVERGES = """
import torch

from training.distributed.replicas import check_replicas


def main(ctx):
    torch.manual_seed(ctx.world.rank)
    check_replicas(ctx.group, torch.nn.Linear(2, 2))
"""


@pytest.mark.slow
def test_a_rank_that_aborts_for_memory_is_not_started_again(local_project: Project) -> None:
    (local_project.folder / "aborts.py").write_text(ABORTS_IN_A_RANK)
    local_project.call("--cpus", "2", "--name", "a", "aborts.py", status=1)
    status = local_project.status("a")
    assert (status["failure"]["kind"], status["failure"]["rank"], status["attempt"]) == ("out of memory", 1, 1)
    assert status["failure"]["message"] == "rank 1 was ended by SIGABRT: CUDA error: out of memory"


@pytest.mark.slow
def test_ranks_that_call_different_collectives_are_not_started_again(local_project: Project) -> None:
    """gloo aborts the rank that receives too much, and the others lose their connection."""
    (local_project.folder / "mismatched.py").write_text(MISMATCHED)
    done = local_project.call("--cpus", "2", "--name", "m", "mismatched.py", status=1)
    status = local_project.status("m")
    assert (status["failure"]["kind"], status["attempt"]) == ("user error", 1)
    assert "collective mismatch" in status["failure"]["message"]
    assert "TORCH_DISTRIBUTED_DEBUG=DETAIL names them" in done.stdout


@pytest.mark.slow
def test_ranks_that_hold_different_weights_end_the_run(local_project: Project) -> None:
    (local_project.folder / "diverges.py").write_text(DIVERGES)
    done = local_project.call("--cpus", "2", "--name", "d", "diverges:main", status=1)
    status = local_project.status("d")
    assert (status["failure"]["kind"], status["attempt"]) == ("diverged", 1)
    assert (
        "rank 1 of 2 ranks hold other weights than the rest (2 of 2 parameters differ" in status["failure"]["message"]
    )
    assert "The ranks train different models." in done.stdout
    assert "Traceback" not in done.stdout
