"""The programs of the differential suite.

Each sets `found`, values that must be equal under torchrun and under launch, rank by rank, and may set `distinct`, values
that must differ from rank to rank. Other files of a program lie beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

REPORT = """
import json as _json, os as _os
with open(_os.path.join(_os.environ["OBSERVED"], _os.environ["RANK"]), "w") as _file:
    _json.dump([found, globals().get("distinct")], _file)
"""

INDENTED = REPORT.strip().replace("\n", "\n    ")
"""`REPORT` for the end of an indented block."""


@dataclass(frozen=True)
class Program:
    """One program: its source, other files, the words after its name, and variables of the shell that starts it.

    Attributes:
        module: it is started by ``-m``, as this module.
        script: its file, in the folder of the project.
        fails: it ends with an error.
    """

    source: str
    files: Mapping[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = ""
    script: str = "program.py"
    fails: bool = False


def reporting(source: str, **fields: object) -> Program:
    """Return a program that reports what it found at its end."""
    return Program(source.strip() + REPORT, **fields)  # type: ignore[arg-type]


CLASS = """
class Item:
    def __init__(self, n): self.n = n

def make(n): return Item(n)
"""

POOL = (
    CLASS
    + """
if __name__ == "__main__":
    import multiprocessing
    with multiprocessing.get_context("METHOD").Pool(2) as pool:
        made = pool.map(make, range(4))
    found = [[type(item) is Item, item.n] for item in made]
"""
)


def pool(method: str) -> Program:
    """A pool of processes that return objects of a class of the script."""
    return Program(f"{POOL.replace('METHOD', method)}    {INDENTED}\n")


REPORTED = reporting("found = 1").source
"""A program that has reported, and then ends in some way."""

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""gloo under torchrun otherwise uses the address of the host's name, which may lead nowhere."""

PROGRAMS: dict[str, Program] = {
    # ---- the module __main__ -----------------------------------------------------------------------------------------
    "argv": reporting("import sys, os\nfound = [os.path.basename(sys.argv[0]), sys.argv[1:]]", args=("a", "--b=1", "", "c d")),
    "main names": reporting("""
import os
found = [__name__, os.path.basename(__file__), os.path.isabs(__file__), __spec__ is None, __package__, __cached__,
         type(__loader__).__name__, type(__builtins__).__name__, __doc__, sorted(k for k in globals() if k != "os")]
"""),
    "docstring": reporting('"""Of the program."""\nfound = __doc__'),
    "first import": reporting("""
import sys
heavy = ("torch", "numpy", "ray", "submitit", "transformers", "multiprocessing", "asyncio", "huggingface_hub")
found = sorted(set(heavy) & set(sys.modules))
"""),
    "sys.path": reporting("""
import os, sys
found = [sys.path[0] == os.path.dirname(os.path.abspath(__file__)), "" in sys.path, sys.path.count(sys.path[0])]
"""),
    "main is main": reporting(CLASS + """
import sys, __main__
found = [sys.modules["__main__"].Item is Item, __main__.Item is Item, Item.__module__, Item.__qualname__]
"""),
    "pickle": reporting(CLASS + "import pickle\nfound = [pickle.loads(pickle.dumps(Item(3))).n, b'__main__' in pickle.dumps(Item(3))]"),
    "source": reporting("""
import inspect
def function():
    return 41  # a comment
found = [inspect.getsource(function), inspect.getsourcelines(function)[1], inspect.getmodule(function).__name__]
"""),
    "traceback": reporting("""
import traceback
def fails(): raise ValueError("no")
try:
    fails()
except ValueError:
    lines = traceback.format_exc().splitlines()
found = [len(lines), lines[-1], [line.strip() for line in lines if "fails()" in line]]
"""),
    "dataclass": reporting("""
from __future__ import annotations
import dataclasses, typing
@dataclasses.dataclass
class Config:
    lr: float = 0.1
found = [typing.get_type_hints(Config)["lr"].__name__, dataclasses.asdict(Config()), repr(Config())]
"""),
    "module": reporting("""
from . import sibling
import os, sys
found = [__name__, __package__, __spec__.name, os.path.basename(sys.argv[0]), sys.argv[1:], sibling.NAME,
         os.path.isfile(os.path.join(sys.path[0], "package", "sibling.py"))]
""", module="package.program", script="package/program.py", args=("x",),
        files={"package/__init__.py": "", "package/sibling.py": "NAME = __name__"}),
    "module of a folder": reporting("""
import package.sibling
found = [package.sibling.NAME, package.__file__ is None, __package__]
""", module="package.program", script="package/program.py", files={"package/sibling.py": "NAME = __name__"}),
    "package main": reporting("found = [__name__, __package__, __spec__.name]", module="package",
                              script="package/__main__.py", files={"package/__init__.py": ""}),
    "subfolder": reporting("""
import os, sibling
try:
    import above
except ImportError:
    above = None
found = [sibling.NAME, above is None]
""", script="sub/program.py", files={"sub/sibling.py": "NAME = 'sibling'", "above.py": ""}),
    # ---- imports -----------------------------------------------------------------------------------------------------
    "rank of a module": reporting("import helper\nfound = helper.RANK", files={"helper.py": "import os\nRANK = os.environ.get('RANK')"}),
    "world of a module": reporting("import helper\nfound = helper.FOUND", files={"helper.py": """
import os
FOUND = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")] + [os.environ["WORLD_SIZE"].isdigit()]
"""}),
    "folder of a module": reporting("import helper, os\nfound = os.path.isdir(helper.FOLDER)\ndistinct = helper.FOLDER",
                                    files={"helper.py": "import tempfile\nFOLDER = tempfile.mkdtemp()"}),
    "id of a module": reporting("import helper\nfound = len(helper.ID)\ndistinct = helper.ID",
                                files={"helper.py": "import uuid\nID = uuid.uuid4().hex"}),
    "pid of a module": reporting("import helper, os\nfound = helper.PID == os.getpid()\ndistinct = helper.PID",
                                 files={"helper.py": "import os\nPID = os.getpid()"}),
    "random of a module": reporting("import helper\nfound = None\ndistinct = helper.VALUE",
                                    files={"helper.py": "import random\nVALUE = random.random()"}),
    "numpy random": reporting("import numpy\nfound = None\ndistinct = float(numpy.random.rand())"),
    "torch random": reporting("import torch\nfound = None\ndistinct = torch.initial_seed()"),
    "thread of a module": reporting("""
import helper
helper.jobs.put(1)
helper.jobs.join()
found = helper.DONE
""", files={"helper.py": """
import queue, threading
jobs, DONE = queue.Queue(), []
def drain():
    while True:
        DONE.append(jobs.get())
        jobs.task_done()
threading.Thread(target=drain, daemon=True).start()
"""}),
    "variable before an import": reporting("""
import os
os.environ["HF_HOME"] = "/nowhere/of-the-script"
os.environ["HF_HUB_OFFLINE"] = "1"
from huggingface_hub import constants
found = [constants.HF_HOME, constants.HF_HUB_OFFLINE]
"""),
    "threads before an import": reporting("""
import os
os.environ["OMP_NUM_THREADS"] = "3"
import torch
found = torch.get_num_threads()
"""),
    "import that is not taken": reporting("""
import sys
if len(sys.argv) > 1:
    import breaks
def never():
    import breaks
found = "breaks" in sys.modules
""", files={"breaks.py": "raise RuntimeError('imported')"}),
    "own random": reporting("import random\nfound = random.MINE", files={"random.py": "MINE = 1"}),
    "own queue": reporting("import queue\nfound = queue.MINE", files={"queue.py": "MINE = 2"}),
    "own logging": reporting("import logging\nfound = logging.MINE", files={"logging.py": "MINE = 3"}),
    "own training": reporting("import training.items\nfound = training.items.MINE",
                              files={"training/__init__.py": "", "training/items.py": "MINE = 4"}),
    "own launcher": reporting("import launcher\nfound = launcher.MINE", files={"launcher.py": "MINE = 5"}),
    "top level runs once": reporting("""
import os
path = os.path.join(os.environ["OBSERVED"], "runs-" + os.environ["RANK"])
with open(path, "a") as file:
    file.write("x")
found = len(open(path).read())
"""),
    "installed": reporting("import importlib.metadata\nfound = importlib.metadata.version('torch')"),
    # ---- environment and process -------------------------------------------------------------------------------------
    "environment": reporting("""
import os
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
         "ROLE_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE")
found = [os.environ.get(name) for name in names] + [bool(os.environ["MASTER_ADDR"]), os.environ["MASTER_PORT"].isdigit()]
"""),
    "variables of python": reporting("""
import os
found = {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "LD_", "MALLOC_", "TORCH_", "PYTORCH_", "CUDA_"))}
found.pop("PYTHONPATH", None)
"""),
    "stale ranks": reporting("""
import os
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR")
found = [os.environ[name] != "stale" and os.environ[name] != "77" for name in names] + [os.environ["RANK"]]
""", environment=dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"), "77")
        | {"MASTER_ADDR": "stale"}),
    "descriptors": reporting("""
import os
found = sorted(int(n) for n in os.listdir("/proc/self/fd") if int(n) > 2 and os.path.exists(f"/proc/self/fd/{n}"))
found = [name for name in (os.readlink(f"/proc/self/fd/{n}") for n in found) if not name.endswith("/fd")]
found = [name for name in found if not name.startswith(("socket:", "pipe:", "anon_inode:", "/dev/", "/memfd:"))]
"""),
    "groups of processes": reporting("""
import os
found = [os.getpgrp() == os.getpid(), os.tcgetpgrp(0) if os.isatty(0) else None]
"""),
    "variables of the shell": reporting("import os\nfound = [os.environ.get('OF_THE_SHELL'), os.environ.get('EMPTY'), os.environ['PATH'] != '']",
                                        environment={"OF_THE_SHELL": "a 'b' $c \\ é", "EMPTY": ""}),
    "threads": reporting("import os, torch\nfound = [torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS')]"),
    "threads of the shell": reporting("import os, torch\nfound = [torch.get_num_threads(), os.environ['OMP_NUM_THREADS']]",
                                      environment={"OMP_NUM_THREADS": "2"}),
    "threads of blas": reporting("""
import numpy, threadpoolctl
found = sorted({pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"})
"""),
    "hash seed": reporting("found = hash('text')", environment={"PYTHONHASHSEED": "7"}),
    "optimised": reporting("import sys\nfound = [sys.flags.optimize, __debug__]", environment={"PYTHONOPTIMIZE": "1"}),
    "utf-8": reporting("import sys\nfound = [sys.getfilesystemencoding(), sys.stdout.encoding, sys.stdout.errors]"),
    "interpreter": reporting("""
import gc, sys
found = [sys.version, sys.prefix, sys.executable, gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit(),
         list(sys.flags)[:3], sys.excepthook is sys.__excepthook__, sys.getswitchinterval()]
"""),
    "signals": reporting("""
import signal
found = {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGCHLD", "SIGPIPE")}
found["SIGINT"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
found["blocked"] = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
"""),
    "main thread": reporting("""
import threading
found = [threading.active_count(), threading.current_thread() is threading.main_thread(), threading.current_thread().name]
"""),
    "warnings and logging": reporting("""
import logging, warnings
found = [logging.root.level, len(logging.root.handlers), sorted(f[2].__name__ for f in warnings.filters)]
"""),
    "umask and limits": reporting("""
import os, resource
mask = os.umask(0); os.umask(mask)
found = [mask, os.nice(0), resource.getrlimit(resource.RLIMIT_STACK)[0]]
"""),
    "folder": reporting("import os\nfound = [open('data.txt').read(), os.path.isfile('program.py')]", files={"data.txt": "text"}),
    "data beside the script": reporting("import pathlib\nfound = (pathlib.Path(__file__).parent / 'data.txt').read_text()",
                                        files={"data.txt": "beside"}),
    "standard input": reporting("import sys\nfound = [sys.stdin.read(), sys.stdin.isatty(), sys.stdout.isatty()]"),
    "process name": reporting("""
import multiprocessing
found = [multiprocessing.current_process().name, multiprocessing.parent_process() is None, multiprocessing.get_start_method()]
"""),
    # ---- children ----------------------------------------------------------------------------------------------------
    "pool fork": pool("fork"),
    "pool spawn": pool("spawn"),
    "pool forkserver": pool("forkserver"),
    "executor": Program(CLASS + """
if __name__ == "__main__":
    import concurrent.futures, multiprocessing
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        item = executor.submit(make, 5).result()
    found = [type(item) is Item, item.n]
    """ + INDENTED + "\n"),
    "manager": Program("""
if __name__ == "__main__":
    import multiprocessing
    with multiprocessing.Manager() as manager:
        shared = manager.dict(a=1)
        shared["b"] = 2
        found = dict(shared)
    """ + INDENTED + "\n"),
    "loader": Program("""
if __name__ == "__main__":
    import torch
    loader = torch.utils.data.DataLoader(list(range(6)), batch_size=2, num_workers=2, multiprocessing_context="spawn")
    found = [batch.tolist() for batch in loader]
    """ + INDENTED + "\n"),
    "spawn of torch": Program("""
def child(number, folder):
    open(f"{folder}/child-{number}-" + __import__("os").environ["RANK"], "w").close()

if __name__ == "__main__":
    import os, torch.multiprocessing
    torch.multiprocessing.spawn(child, (os.environ["OBSERVED"],), nprocs=2)
    found = sorted(n for n in os.listdir(os.environ["OBSERVED"]) if n.startswith("child") and n.endswith(os.environ["RANK"]))
    """ + INDENTED + "\n"),
    "subprocess": reporting("""
import subprocess, sys
child = "import os, sys; print(os.environ['RANK'], sys.path[0] == ''); sys.exit(5)"
done = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
found = [done.returncode, done.stdout]
"""),
    "fork and wait": reporting("""
import os
pid = os.fork()
if pid == 0:
    os._exit(6)
found = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""),
    "asyncio": reporting("""
import asyncio
async def main():
    child = await asyncio.create_subprocess_exec("sh", "-c", "exit 7")
    return await child.wait()
found = asyncio.run(main())
"""),
    # ---- ends --------------------------------------------------------------------------------------------------------
    "exit 0": Program(REPORTED + "\nimport sys\nsys.exit(0)\n"),
    "exit without a word": Program(REPORTED + "\nimport sys\nsys.exit()\n"),
    "hard exit": Program(REPORTED + "\nimport os\nos._exit(0)\n"),
    "exit 3": Program(REPORTED + "\nimport sys\nsys.exit(3)\n", fails=True),
    "exit with a text": Program(REPORTED + "\nraise SystemExit('no')\n", fails=True),
    "exception": Program(REPORTED + "\nraise ValueError('no')\n", fails=True),
    "usage": Program(REPORTED + "\nimport argparse\nargparse.ArgumentParser().parse_args()\n",
                     args=("--unknown",), fails=True),
    "syntax error": Program("found = (", fails=True),
    "missing import": Program("import no_such_module", fails=True),
    "exit handlers": Program("import atexit\nfound = 1\n@atexit.register\ndef last():\n    "
                             + INDENTED + "\n"),
    "threads at the end": Program("import threading, time\nfound = 1\ndef last():\n    time.sleep(0.3)\n    "
                                  + INDENTED + "\nthreading.Thread(target=last).start()\n"),
    # ---- frameworks --------------------------------------------------------------------------------------------------
    "all-reduce": reporting("""
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.ones(3)
dist.all_reduce(value)
found = [(value / dist.get_world_size()).tolist(), dist.get_rank(), dist.is_torchelastic_launched()]
dist.barrier()
dist.destroy_process_group()
""", environment=LOOPBACK),
    "gather": reporting("""
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, [dist.get_rank(), int(os.environ["LOCAL_RANK"]), int(os.environ["GROUP_RANK"])])
first = [os.getpid()]
dist.broadcast_object_list(first)
pairs = [dist.new_group([rank, rank + 1]) for rank in range(0, dist.get_world_size(), 2)]
value = torch.tensor(float(dist.get_rank()))
dist.all_reduce(value, group=pairs[dist.get_rank() // 2])
found = [everyone, (first == [os.getpid()]) == (dist.get_rank() == 0), value.item()]
dist.barrier()
dist.destroy_process_group()
""", environment=LOOPBACK),
    "device mesh": reporting("""
import os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
each = int(os.environ["LOCAL_WORLD_SIZE"])
mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]) // each, each), mesh_dim_names=("node", "local"))
found = [mesh.get_coordinate(), mesh["local"].get_local_rank(), mesh["node"].size()]
dist.barrier()
dist.destroy_process_group()
""", environment=LOOPBACK),
    "replicas": reporting("""
import torch, torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
model(torch.ones(2, 3) * dist.get_rank()).sum().backward()
found = [[round(v, 6) for p in model.parameters() for v in p.grad.flatten().tolist()],
         [round(v, 6) for p in model.parameters() for v in p.flatten().tolist()]]
dist.barrier()
dist.destroy_process_group()
""", environment=LOOPBACK),
    "store": reporting("""
import datetime, os, torch.distributed as dist
dist.init_process_group("gloo")
store = dist.PrefixStore("mine", dist.distributed_c10d._get_default_store())
store.set(os.environ["RANK"], os.environ["LOCAL_RANK"])
dist.barrier()
found = [store.get(str(rank)).decode() for rank in range(dist.get_world_size())]
dist.barrier()
dist.destroy_process_group()
""", environment=LOOPBACK),
    "store at the master port": reporting("""
import os, torch.distributed as dist
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
store.set(os.environ["RANK"], os.environ["LOCAL_RANK"])
found = [store.get(str(rank)).decode() for rank in range(int(os.environ["WORLD_SIZE"]))]
"""),
    "rank 0 ends first": reporting("""
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, found = dist.get_rank(), 0
pid = [os.getpid()]
dist.broadcast_object_list(pid)
dist.barrier()
if rank == 0:
    dist.destroy_process_group()
else:
    while os.path.exists(f"/proc/{pid[0]}"):
        time.sleep(0.05)
    value = torch.tensor([rank])
    group = dist.new_group(range(1, dist.get_world_size()), use_local_synchronization=True)
    dist.all_reduce(value, group=group)
    found = value.item()
    dist.barrier(group=group)
    dist.destroy_process_group()
""", environment=LOOPBACK),
    "sampler": reporting("""
import torch, torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
dist.init_process_group("gloo")
found = []
for epoch in range(2):
    sampler = DistributedSampler(range(10), shuffle=True, seed=3)
    sampler.set_epoch(epoch)
    found.append([batch.tolist() for batch in DataLoader(range(10), batch_size=2, sampler=sampler)])
dist.barrier()
dist.destroy_process_group()
""", environment=LOOPBACK),
    "accelerator": reporting("""
from accelerate import Accelerator
accelerator = Accelerator()
found = [accelerator.process_index, accelerator.local_process_index, accelerator.is_main_process,
         str(accelerator.distributed_type), accelerator.device.type, accelerator.mixed_precision]
accelerator.wait_for_everyone()  # a rank that ends while another one still connects to it makes that one fail
""", environment={**LOOPBACK, "ACCELERATE_USE_CPU": "true"}),  # which launch sets on CPUs; else it is not distributed there
}  # fmt: skip
"""By name. Of a program that ends before its report, only whether it fails is compared."""

CHEAP = sorted(
    name for name, program in PROGRAMS.items() if not re.search("torch|numpy|accelerate|hub|Pool", program.source)
)
"""Programs of about a second: those that import nothing large."""
