"""Options of torchrun, accelerate, sbatch and srun: what each means here.

Each table maps an option to what `launch` takes in its place. Sources: ``torchrun --help`` (torch 2.13), ``accelerate launch
--help`` (accelerate 1.15), sbatch(1) and srun(1) (SLURM 22.05 to 26.05).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.errors import BadRequest

Words = list[str]


@dataclass(frozen=True)
class Meaning:
    """What an option of another program means.

    Attributes:
        options: makes words of `launch` of its value; None: it has no place here, and `why` is noted or refused.
        takes: whether it has a value.
        why: why it is dropped or refused.
        refused: it changes what the program does, so it is an error rather than a note.
    """

    options: Callable[[str], Words] | None = None
    takes: bool = True
    why: str = ""
    refused: bool = False


@dataclass
class Translation:
    """Words of `launch` in place of those typed, and notes on what was dropped."""

    words: Words = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _to(option: str) -> Meaning:
    return Meaning(lambda value: [option, value])


def _key(key: str) -> Meaning:
    return Meaning(lambda value: ["--set", f"{key}={value}"])


def _flag(*words: str) -> Meaning:
    return Meaning(lambda _: list(words), takes=False)


def _dropped(why: str, takes: bool = True) -> Meaning:
    return Meaning(None, takes, why)


def _refused(why: str, takes: bool = True) -> Meaning:
    return Meaning(None, takes, why, refused=True)


def _nodes(value: str) -> Words:
    low, _, high = value.partition(":")
    if high and low != high:
        raise BadRequest(f"--nnodes {value}: a run has a fixed number of nodes. Write --nodes {high}.")
    return ["--nodes", low]


def _node_range(value: str) -> Words:
    low, _, high = value.partition("-")
    if high and low != high:
        raise BadRequest(f"-N {value}: a run has a fixed number of nodes. Write --nodes {high}.")
    return ["--nodes", low]


def _per_node(value: str) -> Words:
    return ["--ranks-per-node", value]


def _gpus(value: str) -> Words:
    """``8``, ``all``, ``h100:8``, ``8xh100``, ``h100`` (one) as sbatch, Ray and people write a number of GPUs."""
    if value == "all":
        return ["--ranks-per-node", "gpu"]
    if match := re.fullmatch(r"([A-Za-z][\w.-]*):([0-9]+)|([0-9]+)x([A-Za-z][\w.-]*)", value):
        return ["--gpus", match[2] or match[3], "--accelerator", match[1] or match[4]]
    return ["--gpus", value]


def _gpus_of_node(value: str) -> Words:
    kind, _, count = value.rpartition(":")
    return ["--gpus-per-node", count, *(["--accelerator", kind] if kind else [])]


def _gres(value: str) -> Words:
    match = re.fullmatch(r"(?:gres[/:])?gpu(?::([A-Za-z][\w.-]*))?(?::([0-9]+))?", value)
    if match is None:
        raise BadRequest(
            f"--gres {value}: only GPUs can be asked for, as in --gres gpu:h100:8. Others: --set slurm.sbatch.gres."
        )
    return _gpus_of_node(":".join(filter(None, (match[1], match[2] or "1"))))


def _export(value: str) -> Words:
    """``ALL,A=1,B`` of sbatch; the ranks have the shell's variables in any case."""
    names = [entry for entry in value.split(",") if entry != "ALL"]
    if "NONE" in names or "NIL" in names:
        raise BadRequest(
            f"--export {value}: the ranks get the variables of this shell. Write env -i PATH=$PATH HOME=$HOME launch ..."
        )
    return [word for entry in names for word in ("--env", entry)]


CONFIG_FILE = ("--config_file", "--config-file")
"""accelerate's configuration file, which `launcher.cli.parser.split` has accelerate read."""

_MEETING = "the ranks meet at an address that launch chooses"
_LOGS = "the run directory holds the logs; `launch logs` shows them"

TORCHRUN: Mapping[str, Meaning] = {
    **dict.fromkeys(("--nproc-per-node", "--nproc_per_node"), Meaning(_per_node)),
    "--nnodes": Meaning(_nodes),
    "--standalone": _dropped(_MEETING, takes=False),
    **dict.fromkeys(
        [
            *("--rdzv-backend", "--rdzv_backend", "--rdzv-endpoint", "--rdzv_endpoint", "--rdzv-id", "--rdzv_id"),
            *("--rdzv-conf", "--rdzv_conf", "--master-addr", "--master_addr", "--master-port", "--master_port"),
            *("--local-addr", "--local_addr", "--node-rank", "--node_rank"),
        ],
        _dropped(_MEETING),
    ),
    **dict.fromkeys(("--max_restarts",), _to("--max-restarts")),
    **dict.fromkeys(
        ("--monitor-interval", "--monitor_interval", "--start-method", "--start_method", "--role"),
        _dropped("launch supervises the ranks by itself"),
    ),
    **dict.fromkeys(
        ("--log-dir", "--log_dir", "-r", "--redirects", "-t", "--tee", "--local-ranks-filter", "--local_ranks_filter"),
        _dropped(_LOGS),
    ),
    **dict.fromkeys(("--no-python", "--no_python"), _refused("launch starts Python programs", takes=False)),
    **dict.fromkeys(
        ("--run-path", "--run_path"), _dropped("a script runs as its main module in any case", takes=False)
    ),
}

ACCELERATE: Mapping[str, Meaning] = {
    **dict.fromkeys(("--num_processes", "--num-processes"), _to("--ranks")),
    **dict.fromkeys(("--num_machines", "--num-machines"), _to("--nodes")),
    **dict.fromkeys(
        [
            *("--machine_rank", "--machine-rank", "--main_process_ip", "--main-process-ip"),
            *("--main_process_port", "--main-process-port", "--rdzv_backend", "--rdzv_conf", "--same_network"),
        ],
        _dropped(_MEETING),
    ),
    **dict.fromkeys(("--mixed_precision", "--mixed-precision"), _key("environment.ACCELERATE_MIXED_PRECISION")),
    **dict.fromkeys(
        ("--num_cpu_threads_per_process", "--num-cpu-threads-per-process"), _key("environment.OMP_NUM_THREADS")
    ),
    **dict.fromkeys(
        ("--gradient_accumulation_steps", "--gradient-accumulation-steps"),
        _key("environment.ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    ),
    **dict.fromkeys(("--multi_gpu", "--multi-gpu"), _dropped("the number and kind of devices say so", takes=False)),
    **dict.fromkeys(
        ("--enable_cpu_affinity", "--enable-cpu-affinity"), _dropped("launch binds ranks to cores", takes=False)
    ),
    "--debug": _flag("--set", "environment.ACCELERATE_DEBUG_MODE=true"),
    "--cpu": _refused("write --cpus N, the number of ranks on CPU cores", takes=False),
    "--tpu": _refused("write --tpus N --accelerator v5e, the number of chips and their generation", takes=False),
    **dict.fromkeys(("--gpu_ids", "--gpu-ids"), _key("environment.CUDA_VISIBLE_DEVICES")),
    **dict.fromkeys(
        [
            *("--use_deepspeed", "--use_fsdp", "--use_parallelism_config", "--use_megatron_lm"),
            *("--use-deepspeed", "--use-fsdp", "--use-parallelism-config", "--use-megatron-lm"),
        ],
        _refused("write launch accelerate launch in front of it: accelerate knows what it means", takes=False),
    ),
    **dict.fromkeys(CONFIG_FILE, _to("--config-file")),
}

SBATCH: Mapping[str, Meaning] = {
    **dict.fromkeys(("-N",), Meaning(_node_range)),
    **dict.fromkeys(("-n", "--ntasks"), _to("--ranks")),
    "--ntasks-per-node": Meaning(_per_node),
    **dict.fromkeys(("-c", "--cpus-per-task"), _to("--cpus-per-rank")),
    **dict.fromkeys(("-p", "--partition"), _key("slurm.partition")),
    **dict.fromkeys(("-A", "--account"), _key("slurm.account")),
    **dict.fromkeys(("-q", "--qos"), _key("slurm.qos")),
    **dict.fromkeys(("-w", "--nodelist"), _key("slurm.nodelist")),
    **dict.fromkeys(("-x", "--exclude"), _key("slurm.exclude")),
    **dict.fromkeys(("-C", "--constraint"), _key("slurm.constraint")),
    "--reservation": _key("slurm.reservation"),
    "--exclusive": _flag("--set", "slurm.exclusive=true"),
    "--mem": _key("slurm.mem"),
    **dict.fromkeys(("-t",), _to("--time")),
    **dict.fromkeys(("-J", "--job-name"), _to("--name")),
    **dict.fromkeys(("-G", "--gpus"), Meaning(_gpus)),
    "--gpus-per-node": Meaning(_gpus_of_node),
    "--gres": Meaning(_gres),
    **dict.fromkeys(("-d", "--dependency"), _key("slurm.sbatch.dependency")),
    **{
        f"--{name}": _key(f"slurm.sbatch.{name}")
        for name in (
            *("begin", "comment", "licenses", "mail-type", "mail-user", "nice", "priority", "switches", "tmp", "wckey"),
            *("deadline", "gpu-bind", "gpu-freq", "hint", "threads-per-core", "cpu-freq", "power", "network", "prefer"),
        )
    },
    **dict.fromkeys(("-o", "--output", "-e", "--error", "-i", "--input", "--open-mode"), _dropped(_LOGS)),
    **dict.fromkeys(("-l", "--label", "-u", "--unbuffered"), _dropped(_LOGS, takes=False)),
    **dict.fromkeys(
        ("-v", "--verbose", "-Q", "--quiet", "--kill-on-bad-exit", "-K"),
        _dropped("launch reports by itself", takes=False),
    ),
    "--requeue": _dropped("a preempted run is requeued in any case", takes=False),
    "--no-requeue": Meaning(lambda _: ["--set", "slurm.sbatch.requeue=false"], takes=False),
    "--signal": _refused("launch sends the ranks SIGTERM before the end; `--set grace=120` sets how long before"),
    **dict.fromkeys(
        ("--mem-per-gpu", "--mem-per-cpu"),
        _refused("write --mem, the memory of each node, or node.memory_gb in the profile"),
    ),
    **dict.fromkeys(
        ("--gpus-per-task", "--ntasks-per-gpu", "--cpus-per-gpu", "--gpus-per-socket", "--ntasks-per-socket"),
        _refused("each rank has one GPU; write --gpus and --cpus-per-rank"),
    ),
    **dict.fromkeys(("-a", "--array"), _refused("write one command for each run")),
    **dict.fromkeys(("-D", "--chdir"), _refused("a run starts in the folder of the command: cd there first")),
    "--wrap": _refused("write the program after the options"),
    "--export": Meaning(_export),
    **dict.fromkeys(("-M", "--clusters"), _refused("SLURM_CONF chooses the cluster that sbatch uses")),
    **dict.fromkeys(("-W", "--wait"), _dropped("launch ends the ranks of a failed run by itself")),
    "--mpi": _dropped("ranks are started by launch", takes=True),
    "--cpu-bind": _dropped("launch binds each rank to its cores"),
}

DIRECT: Mapping[str, Meaning] = {**TORCHRUN, **ACCELERATE, **SBATCH}
"""What is typed after `launch` itself; a short option is sbatch's."""


def meaning_of(word: str, table: Mapping[str, Meaning]) -> tuple[str, Meaning, str | None] | None:
    """The option that `word` begins with, its meaning, and the value that is attached to it (``--a=b``, ``-N2``)."""
    name, equals, value = word.partition("=")
    if name in table:
        return name, table[name], value if equals else None
    short = word[:2]
    if len(word) > 2 and not word.startswith("--") and short in table and table[short].takes:
        return short, table[short], word[2:].removeprefix("=")
    return None


def translate(name: str, meaning: Meaning, value: str, done: Translation) -> None:
    """Append what the option `name` with `value` means to `done`.

    Raises:
        BadRequest: it has no place here, and a run without it would be another one.
    """
    typed = f"{name} {value}".rstrip()
    if meaning.options is not None:
        done.words += meaning.options(value)
    elif meaning.refused:
        raise BadRequest(f"{typed}: `launch` does not take it; {meaning.why}.")
    else:
        done.notes.append(f"{typed} is not used: {meaning.why}")


def take(words: Sequence[str], index: int, table: Mapping[str, Meaning], done: Translation) -> int:
    """Translate the option at `index` of `words`; return the index behind it and its value, or `index` if it is none.

    Raises:
        BadRequest: see `translate`; or its value is missing.
    """
    found = meaning_of(words[index], table)
    if found is None:
        return index
    name, meaning, value = found
    index += 1
    if meaning.takes and value is None:
        if index == len(words):
            raise BadRequest(f"{name}: a value is needed.")
        value, index = words[index], index + 1
    translate(name, meaning, value or "", done)
    return index
