"""How long the launcher waits, for what, and how often it looks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Seconds. Limits that a user may set for a run are in the profile (`launcher.config.cluster.Cluster`).

    Attributes of a run:
        run_heartbeat: between two heartbeats of the supervisor of a run.
        run_heartbeat_age: a run whose heartbeat is younger is alive; its engine is not asked.
        follow: between two looks at a run that is followed, while something happens.
        follow_silent: the same after silence of 20 times as long.
        answer: wait for another command of this user that asks the scheduler; then this one asks, too.
        mount: wait, between two attempts, for a run directory that cannot be written; a lost mount may come back.

    Attributes of agents:
        connect: the agents of a run wait for each other at the start; nodes of one allocation can boot minutes apart.
        heartbeat: between two reports of an agent that it is alive, with the status of its ranks.
        silence: a connected agent that is silent for longer is lost; a machine without power closes no connection.
        hello: a new connection has to send its first message.
        reconnect: an agent whose connection has ended is lost unless it connects again; it tries at once.
        disconnect: the coordinator waits, after the end, for the other agents to disconnect.
        suspended: agents report every `heartbeat`; after a longer gap the machine or this process was suspended.
        late_signal: after the last rank's end, a signal to this process may still arrive.
        late_signal_scheduler: the same if a scheduler signals every process of the job.

    Attributes of ranks:
        error_grace: after one rank raised, the others may record their own errors before they are killed.
        killed_rank: a killed rank that is still there belongs to a node that is given up; a process in the D state, in a
            driver or a file system, cannot be killed.
        ranks_end: wait for the end of a node's ranks after they are killed.
        stack_dump: ranks write their stacks, in a signal handler in C that no Python code delays.
        collectives: after that, ranks write the collectives that they entered; a rank whose Python does not run writes none.
        standby: the imports of a rank have to be unchanged for so long before its standby interpreter starts.
        same_stop: a SIGTERM from the agent within this time after one from outside is the same stop, sent twice.

    Attributes of visits (`launch stacks`, `exec`, `shell`):
        visit_look: between two looks of a supervisor for requests of clients.
        visit: a client waits for the sessions on the nodes.
        visit_connect: a session tries to connect to one address of a client.
        visit_next: after this time it also tries the next address.
        stack_answer: a rank writes its stacks for `launch stacks`, even if its cores are busy.
        py_spy: py-spy shows the stacks of a process.
        rank_answers: a rank that was asked to open a debugger comes to its next line of Python.
        session_end: a session ends its processes before it is killed.

    Attributes of checks:
        probe: one name, one connection, or one file to appear on another node.
        probe_ranks: the ranks of a node start this far apart at most.
        node_check: each check of a node; a mount or a driver that hangs must not delay the others.
        node_answer: all checks of a node.
        clock_skew: clocks further apart make the times of events of different nodes misleading, and break certificates.
        gpu_driver: the driver's answer; without its persistence mode it first wakes every GPU, 1 s each.
        gpu_diagnosis: the quick level of dcgmi diag.
        gpu_trial: import torch and compute once on a GPU.
        slow_pair: two nodes that take longer for 1 MiB are measured no further.
        bandwidth_rounds: no further round of measurements begins after this time.

    Attributes of SLURM:
        slurm_command: one command; slurmctld is slow for minutes when thousands of jobs start.
        slurm_controller: repeat a command while slurmctld does not answer; it restarts for upgrades.
        batch_heartbeat: a batch script touches its file every second; without a change within this time it has ended.
        srun_wait: srun waits for the other agents once one has ended, if no spare node can replace it.

    Attributes of Ray:
        ray_head: the head accepts a connection; `ray.init` would try for 300 s.
        ray_accept: the driver reports whether the cluster can hold the run.
        ray_look: between two looks for a request to stop, and for drained and new nodes.
        ray_node_actor: wait for a node's actor to start.
        ray_node_listed: Ray may list a node that is gone.
        ray_node_answer: after a rank was killed, wait for an answer of its node, which may be gone.
        ray_node_dying: a node that is going down may answer after one of its workers has ended.
        ray_before_drained: the ranks of a drained node end this long before it goes.
        ray_in_use: a worker group may take this long to start before the event `waiting` is written.
        ray_group_end: Ray Train ends a worker group; its workers are then killed, and it gets as long again.
        ray_leave: disconnect from a cluster.
        ray_processes_end: Ray's own processes of a node end before they are killed.
    """

    run_heartbeat: float = 2.0
    run_heartbeat_age: float = 10.0
    follow: float = 0.1
    follow_silent: float = 1.0
    answer: float = 20.0
    mount: float = 120.0

    connect: float = 300.0
    heartbeat: float = 1.0
    silence: float = 20.0
    hello: float = 5.0
    reconnect: float = 3.0
    disconnect: float = 10.0
    suspended: float = 10.0
    late_signal: float = 0.05
    late_signal_scheduler: float = 0.5

    error_grace: float = 0.5
    killed_rank: float = 30.0
    ranks_end: float = 20.0
    stack_dump: float = 1.0
    collectives: float = 5.0
    standby: float = 5.0
    same_stop: float = 5.0

    visit_look: float = 0.5
    visit: float = 15.0
    visit_connect: float = 8.0
    visit_next: float = 0.3
    stack_answer: float = 3.0
    py_spy: float = 20.0
    rank_answers: float = 3.0
    session_end: float = 5.0

    probe: float = 5.0
    probe_ranks: float = 30.0
    node_check: float = 30.0
    node_answer: float = 40.0
    clock_skew: float = 1.0
    gpu_driver: float = 12.0
    gpu_diagnosis: float = 60.0
    gpu_trial: float = 120.0
    slow_pair: float = 0.2
    bandwidth_rounds: float = 30.0

    slurm_command: float = 60.0
    slurm_controller: float = 60.0
    batch_heartbeat: float = 1.0
    srun_wait: int = 120

    ray_head: float = 5.0
    ray_accept: float = 180.0
    ray_look: float = 0.5
    ray_node_actor: float = 60.0
    ray_node_listed: float = 15.0
    ray_node_answer: float = 5.0
    ray_node_dying: float = 1.0
    ray_before_drained: float = 2.0
    ray_in_use: float = 30.0
    ray_group_end: float = 10.0
    ray_leave: float = 20.0
    ray_processes_end: float = 10.0


TIMEOUTS = Timeouts()
