"""The environment variables of a rank: complete before its interpreter starts."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan
from training.distributed.world import World

STALE = frozenset(
    (
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "OMPI_UNIVERSE_SIZE", "OMPI_FIRST_RANKS", "OMPI_NUM_APP_CTX"),
        *("PALS_RANKID", "PALS_LOCAL_RANKID", "PALS_NODEID", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
        *("SLURM_PMIX_MAPPING_SERV", "SLURM_PMIXP_ABORT_AGENT_PORT"),
    )
)
STALE_PREFIXES = (
    *("TORCHELASTIC_", "OMPI_COMM_WORLD_", "OMPI_MCA_orte_", "OMPI_MCA_ess_", "OMPI_APP_CTX_", "MV2_COMM_WORLD_"),
    *("PMI_", "PMIX_", "PRTE_", "JSM_NAMESPACE_"),
)
"""Variables that describe a process of another launcher; torch, accelerate, JAX, Lightning and MPI would take the rank for it."""

OF_A_MACHINE = frozenset(
    (
        *(
            "PATH",
            "PWD",
            "OLDPWD",
            "HOME",
            "USER",
            "LOGNAME",
            "USERNAME",
            "MAIL",
            "SHELL",
            "SHLVL",
            "_",
            "HOSTNAME",
            "HOST",
        ),
        *(
            "TERM",
            "COLORTERM",
            "LS_COLORS",
            "COLUMNS",
            "LINES",
            "DISPLAY",
            "WAYLAND_DISPLAY",
            "XAUTHORITY",
            "LANG",
            "LANGUAGE",
        ),
        *(
            "TMPDIR",
            "TMP",
            "TEMP",
            "MANPATH",
            "INFOPATH",
            "PYTHONPATH",
            "PYTHONHOME",
            "PYTHONBREAKPOINT",
            "VIRTUAL_ENV",
        ),
        *(
            "MODULEPATH",
            "MODULESHOME",
            "LOADEDMODULES",
            "_LMFILES_",
            "KRB5CCNAME",
            "PS1",
            "NOTIFY_SOCKET",
            "CUDA_VISIBLE_DEVICES",
        ),
    )
)
OF_A_MACHINE_PREFIXES = (
    *(
        "LC_",
        "LD_",
        "XDG_",
        "DBUS_",
        "SSH_",
        "GPG_",
        "SUDO_",
        "TERM_",
        "VSCODE_",
        "TMUX",
        "STY",
        "BASH_",
        "CONDA_",
        "LMOD_",
    ),
    *("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "RAY_", "KUBERNETES_", "TPU_", "NVIDIA_", "HIP_", "ROCR_", "LAUNCH_"),
)
"""Variables that say where a shell runs: on another machine its own are right."""


def of_the_shell(variables: Mapping[str, str]) -> dict[str, str]:
    """Return those of a submitting shell's variables that are for the program: it gets them on other machines, too."""
    return {
        name: value
        for name, value in variables.items()
        if name not in OF_A_MACHINE | STALE
        and not name.startswith((*OF_A_MACHINE_PREFIXES, *STALE_PREFIXES))
        and not name.lower().endswith("_proxy")
    }


def rank_environment(inherited: Mapping[str, str], plan: Plan, world: World, own: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of the rank that `world` describes.

    Args:
        inherited: of the process that starts the rank.
        plan: its `environment` is the profile's and the submitting shell's; it replaces what is inherited.
        own: further variables of this rank alone, such as the devices that Ray gave it.
    """
    environment = shared_environment(inherited, plan)
    environment |= {k: v for k, v in own.items() if k != "OMP_NUM_THREADS"}  # Ray sets it in its workers
    for name, value in world.environment().items():
        # As under torchrun, a number of threads that the user chose is kept.
        if name != "OMP_NUM_THREADS" or name not in plan.environment:
            environment[name] = value
    if agent_holds_store(plan.placement):
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun does
    if world.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # scripts ask torch.cuda.is_available(), not us
    if "SLURM_PROCID" in environment:
        environment |= slurm_step(world, environment)
        environment = {k: v for k, v in environment.items() if v or not k.startswith("SLURM_")}
    return environment


def complete_environment(
    inherited: Mapping[str, str], plan: Plan, run_dir: RunDir, world: World, own: Mapping[int, dict[str, str]]
) -> dict[str, str]:
    """Return `rank_environment` with what depends on the run directory; `own` are further variables of each rank."""
    environment = rank_environment(inherited, plan, world, own.get(world.rank, {}) | finished_variable(run_dir, world))
    return environment | recorder_variables(environment, run_dir, world)


def agent_holds_store(placement: Placement) -> bool:
    """Return whether the agent of rank 0's node holds the store of the process groups, as under torchrun; else rank 0 does.

    A single rank needs no other holder, and torch_xla has a store, and a port, of its own.
    """
    return placement.world_size > 1 and placement.device in ("cpu", "cuda")


def finished_variable(run_dir: RunDir, world: World) -> dict[str, str]:
    """Return LAUNCH_FINISHED: the file that a program creates to report that it has finished, though it was asked to stop."""
    return {"LAUNCH_FINISHED": str(run_dir.finished(world.attempt, world.rank))}


def recorder_variables(environment: Mapping[str, str], run_dir: RunDir, world: World) -> dict[str, str]:
    """Return what makes torch record the collectives of a rank that uses NCCL, and write them into the run directory.

    At a timeout NCCL's watchdog writes the record to the file of TORCH_FR_DUMP_TEMP_FILE and the rank's number. What
    `environment` has already is kept, under its older names too. Gloo records without being asked.
    """
    if world.device != "cuda" or world.world_size == 1:
        return {}
    wanted = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(run_dir.nccl_dump(world.attempt)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
    }
    return {names[0]: value for names, value in wanted.items() if not any(name in environment for name in names)}


def shared_environment(inherited: Mapping[str, str], plan: Plan) -> dict[str, str]:
    """Return what all ranks of a node have in common, for a process that imports libraries ahead of them."""
    environment = {k: v for k, v in inherited.items() if k not in STALE and not k.startswith(STALE_PREFIXES)}
    environment |= plan.environment
    placement = plan.placement
    if placement.threads and "OMP_NUM_THREADS" not in plan.environment:
        environment["OMP_NUM_THREADS"] = str(placement.threads)  # read by OpenMP and BLAS when they are loaded
    if placement.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def slurm_step(world: World, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return SLURM's variables of a step with one task a rank; ours has one a node, and frameworks would count those.

    A value that is empty stands for a variable that has to go. Source: "OUTPUT ENVIRONMENT VARIABLES" of srun(1).
    """
    each, nodes = world.local_world_size, world.num_nodes
    tasks = f"{each}(x{nodes})" if nodes > 1 else str(each)
    if each * nodes != world.world_size:
        tasks = ""  # how many ranks the other nodes have is not known here
    first = world.rank - world.local_rank
    values: dict[str, object] = {
        "SLURM_PROCID": world.rank,
        "SLURM_LOCALID": world.local_rank,
        "SLURM_NODEID": world.node_rank,
        "SLURM_NTASKS": world.world_size,
        "SLURM_NPROCS": world.world_size,
        "SLURM_NNODES": nodes,
        "SLURM_NTASKS_PER_NODE": tasks and each,
        "SLURM_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NUM_TASKS": world.world_size,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_GTIDS": ",".join(str(first + local) for local in range(each)),
        "SLURM_TASK_PID": "",  # the agent's
    }
    job = inherited.get("SLURM_JOB_ID", "")
    if "JAX_COORDINATOR_ADDRESS" not in inherited and job.isdigit():
        # JAX takes the first node of the step, whose name may not resolve, and which a spare node may have replaced.
        # The port is the one that it derives from the job.
        values["JAX_COORDINATOR_ADDRESS"] = f"{world.master_addr}:{int(job) % 2**12 + 65535 - 2**12 + 1}"
    cpus = inherited.get("SLURM_CPUS_PER_TASK", "")
    if cpus.isdigit():
        values["SLURM_CPUS_PER_TASK"] = max(1, int(cpus) // each)
    return {name: str(value) for name, value in values.items()}
