"""What a rank's environment holds, and what it must not inherit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.client.plan import make_plan
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.environment import of_the_shell, rank_environment, recorder_variables
from launcher.request.spec import Plan, RunSpec
from training.distributed.world import World

STEP = {  # of the second of two tasks
    "SLURM_JOB_ID": "4099",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_GTIDS": "1",
    "SLURM_TASK_PID": "123",
    "SLURM_CPUS_PER_TASK": "4",
}
WORLD = World(3, 1, 1, 4, 2, 2, master_addr="10.0.0.7", master_port=1234)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "script.py").write_text("")
    return make_plan(RunSpec("script.py", backend="local", cpus=2), tmp_path)


def test_the_slurm_step_has_one_task_a_rank(plan: Plan) -> None:
    found = rank_environment(STEP, plan, WORLD, {})
    assert {name: found.get(name) for name in STEP} == {
        "SLURM_JOB_ID": "4099",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_NPROCS": "4",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_GTIDS": "2,3",
        "SLURM_TASK_PID": None,
        "SLURM_CPUS_PER_TASK": "2",
    }
    assert (found["RANK"], found["LOCAL_RANK"], found["GROUP_RANK"], found["WORLD_SIZE"]) == ("3", "1", "1", "4")


def test_slurm_variables_of_uneven_nodes_are_removed(plan: Plan) -> None:
    found = rank_environment(STEP, plan, replace(WORLD, world_size=5), {})
    assert found["SLURM_NTASKS"] == "5"
    assert not {"SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE"} & found.keys()


def test_jax_finds_rank_0_where_it_is(plan: Plan) -> None:
    # The port is that of jax/_src/clusters/slurm_cluster.py for job 4099.
    assert rank_environment(STEP, plan, WORLD, {})["JAX_COORDINATOR_ADDRESS"] == "10.0.0.7:61443"
    own = {**STEP, "JAX_COORDINATOR_ADDRESS": "here:1"}
    assert rank_environment(own, plan, WORLD, {})["JAX_COORDINATOR_ADDRESS"] == "here:1"
    assert "JAX_COORDINATOR_ADDRESS" not in rank_environment({}, plan, WORLD, {})


def test_nothing_of_another_launcher_is_left(plan: Plan) -> None:
    stale = (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri", "OMPI_UNIVERSE_SIZE", "PMI_RANK"),
        *(
            "PMI_SIZE",
            "PMIX_RANK",
            "PMIX_NAMESPACE",
            "MV2_COMM_WORLD_RANK",
            "MPI_LOCALRANKID",
            "TORCHELASTIC_ERROR_FILE",
        ),
        *("PALS_RANKID", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK", "SLURM_PMIX_MAPPING_SERV"),
    )
    kept = {"OMPI_MCA_btl": "tcp", "PATH": "/bin", "MY_RANK": "7"}
    found = rank_environment(dict.fromkeys(stale, "7") | kept, plan, WORLD, {})
    assert not found.keys() & {*stale}
    assert found.items() >= kept.items()


def test_nccl_handles_errors_as_under_torchrun(plan: Plan) -> None:
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    assert rank_environment({}, plan, WORLD, {})[name] == "1"
    assert rank_environment({name: "3"}, plan, WORLD, {})[name] == "3"


MACHINE = (
    "PATH HOME LANG LC_ALL LD_LIBRARY_PATH SSH_AUTH_SOCK TMPDIR https_proxy NO_PROXY RANK SLURM_JOB_ID SLURM_CONF RAY_ADDRESS "
    "CUDA_VISIBLE_DEVICES TORCHELASTIC_RUN_ID PYTHONPATH _"
)


@pytest.mark.parametrize("name", MACHINE.split())
def test_what_describes_a_machine_does_not_leave_it(name: str) -> None:
    assert of_the_shell({name: "here"}) == {}


@pytest.mark.parametrize(
    "name", ["HF_HOME", "WANDB_API_KEY", "NCCL_DEBUG", "PYTHONHASHSEED", "DATA", "LDA_TOPICS", "TERMS"]
)
def test_what_is_for_the_program_goes_with_it(name: str) -> None:
    assert of_the_shell({name: ""}) == {name: ""}


def test_nccl_records_its_collectives_for_the_run_directory(plan: Plan) -> None:
    cuda, run_dir = replace(WORLD, device="cuda", attempt=2), RunDir(plan.run_dir)
    expected = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{plan.run_dir}/logs/2/nccl-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert recorder_variables({}, run_dir, cuda) == expected
    assert recorder_variables({}, run_dir, WORLD) == {}
    assert recorder_variables({}, run_dir, World(device="cuda")) == {}


@pytest.mark.parametrize(
    ("chosen", "left_out"),
    [
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT"),
    ],
)
def test_what_the_user_chose_for_the_recorder_is_kept(plan: Plan, chosen: str, left_out: str) -> None:
    found = recorder_variables({chosen: "0"}, RunDir(plan.run_dir), replace(WORLD, device="cuda"))
    assert left_out not in found
    assert len(found) == 2
