"""``launch doctor --on-nodes``: a short run inside an allocation, and what its findings mean."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import backends
from launcher.agent.health import fabric
from launcher.agent.health.node_facts import differences
from launcher.client.api import submit
from launcher.client.plan import make_plan
from launcher.client.run import Run
from launcher.config.check import Check
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest, LaunchError
from launcher.lifecycle.run_dir import RunDir, tail
from launcher.request.placement.devices import many
from launcher.request.spec import RunSpec, State
from training.distributed.visible import visible_devices
from training.files import read_json

SLOW_PART, FEW_PAIRS = 0.25, 3
"""A pair below this part of the median bandwidth is at fault; of fewer pairs the median says nothing."""

Facts = Mapping[str, Any]


def examine(spec: RunSpec, cwd: Path, patience: float, report: Callable[[str], None]) -> Iterator[Check]:
    """Run the probe as `spec` asks and yield what was found.

    Args:
        patience: seconds for the nodes to find each other once the job has started; waiting in the queue does not count.
        report: called with a line of text about the current wait.
    """
    try:
        plan = make_plan(spec, cwd)
        run = submit(plan)
    except BadRequest as error:
        yield Check(
            "request",
            False,
            str(error),
            "ask for what the partition allows: --nodes, --time, --gpus, or another profile",
        )
        return
    yield Check("request", True, plan.placement.why)
    report(f"waiting for {spec.name} on {plan.placement.nodes} nodes (Ctrl-C ends it)")
    try:
        ended = _wait(run, patience)
    except BaseException:
        run.kill()
        raise
    if not ended:
        run.kill()
    state = run.state()
    if state is State.SUCCEEDED:
        yield from verdicts(run.result())
        _discard(run)
        return
    yield from of_each(run.dir)
    yield from missing(run.dir, plan.placement.nodes)
    yield Check("run", False, _why(run, ended, patience), f"its logs are in {run.path}")


def _wait(run: Run, patience: float) -> bool:
    """Wait for the end of the run, `patience` seconds from the start of its first agent; False where that passes."""
    deadline = float("inf")
    while not run.state().done:
        if deadline == float("inf") and run.dir.agent_log(0).exists():
            deadline = time.monotonic() + patience
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _discard(run: Run) -> None:
    """Remove the run's directory, once its job has ended: until then its agents write their last lines there."""
    plan, job = run.dir.plan(), run.dir.job()
    deadline = time.monotonic() + plan.cluster.grace
    while job and not backends.get(job["backend"]).poll(job["job_id"]).done and time.monotonic() < deadline:
        time.sleep(0.2)
    shutil.rmtree(run.path, ignore_errors=True)


def _why(run: Run, ended: bool, patience: float) -> str:
    if not ended:
        return f"its nodes did not find each other, or did not finish, within {patience:.0f} s"
    try:
        run.check()
    except LaunchError as error:
        return str(error).splitlines()[0]
    return run.state().value


# ---- what the findings mean -------------------------------------------------------------------------------------


def verdicts(found: Facts) -> Iterator[Check]:
    """The checks that follow from what the probe returned."""
    nodes = found["nodes"]
    yield Check("nodes", True, ", ".join(f"{node['host']} ({node['address']})" for node in nodes))
    yield _versions(nodes)
    yield from _devices(nodes)
    yield from _limits(nodes)
    yield from _networks(nodes)
    late = [f"{node['host']} does not see it" for node in nodes if node["seen"] < 0]
    slowest = max(nodes, key=lambda node: node["renames"])
    yield Check(
        "run folder",
        not late,
        "; ".join(late)
        or f"seen by all within {max(n['seen'] for n in nodes):.2f} s; a durable rename takes {slowest['renames'] * 1000:.1f} ms"
        f" on {slowest['host']}, the slowest",
        "set `runs` in the profile to a folder that all nodes mount",
    )
    yield _clocks(nodes)
    blocked = [f"{node['host']} cannot reach {', '.join(node['unreached'])}" for node in nodes if node["unreached"]]
    yield Check(
        "ports",
        not blocked,
        "; ".join(blocked) or "every node reaches every other on ports that the system chose",
        "have TCP ports 1024-65535 opened between the nodes",
    )
    names = sorted({name for node in nodes for name in node["unresolved"]})
    yield Check(
        "names",
        True,
        f"{', '.join(names)} cannot be looked up on the nodes"
        if names
        else "every node's name can be looked up on the others",
        "nothing for `launch`, which uses addresses; tools that use MASTER_ADDR by name hang",
        note=bool(names),
    )
    yield _hub(nodes)
    if "latency" in found:
        yield _all_reduce(found)
    if found.get("pairs"):
        yield of_pairs(found)


def _all_reduce(found: Facts) -> Check:
    """How fast all ranks together are; a note if NCCL stays far below the rate of the network between the nodes."""
    nodes, rate = found["nodes"], found["bytes_per_second"]
    over_network = len(nodes) > 1 and all(node["device"] == "cuda" for node in nodes)
    slow = fabric.below_rate([node["network"] for node in nodes], rate) if over_network else ""
    text = f"{rate / 2**20:.0f} MiB/s through each rank, {found['latency'] * 1e3:.2f} ms for 4 bytes"
    remedy = (
        "run with NCCL_DEBUG=INFO: its lines on NET name the network that it uses; see the profiles examples/network-*"
    )
    return Check("all-reduce", True, f"{text}: {slow}" if slow else text, remedy, note=bool(slow))


def of_pairs(found: Facts) -> Check:
    """Whether two of the nodes are much slower with each other than most are; a note if the measurements do not decide it."""
    hosts = {node["node"]: node["host"] for node in found["nodes"]}
    table = tuple(pair | {"nodes": [hosts[node] for node in pair["nodes"]]} for pair in found["pairs"])
    by_rate = sorted(table, key=lambda pair: float(pair["bytes_per_second"]))
    usual = statistics.median_high(pair["bytes_per_second"] for pair in table)
    delay = statistics.median_high(pair["latency"] for pair in table)
    slow = [pair for pair in by_rate if pair["bytes_per_second"] < usual * SLOW_PART] if len(table) >= FEW_PAIRS else []
    shown = ", ".join(map(_pair, slow or by_rate[:1]))
    text = f"slowest of {many(len(table), 'pair')}: {shown}; the median: {_rates(usual, delay)}"
    if found["rounds_measured"] < found["rounds"]:
        text += f" (measured: {found['rounds_measured']} of {found['rounds']} rounds, each node once in each)"
    # One bad node of three is in two of the three pairs, and then it is the median that is slow.
    uneven = by_rate[0]["bytes_per_second"] < by_rate[-1]["bytes_per_second"] * SLOW_PART
    suspects = set.intersection(*(set(pair["nodes"]) for pair in slow or by_rate[:-1] or by_rate))
    whose = f"of {suspects.pop()}, which they have in common" if len(suspects) == 1 else "between them"
    remedy = f"look at the links {whose} (ethtool, ibstat, NCCL_DEBUG=INFO); slurm.exclude in the profile avoids a node"
    return Check("pairs", not slow, text, remedy, note=uneven and not slow, table=table)


def _pair(pair: Facts) -> str:
    return f"{' - '.join(pair['nodes'])} {_rates(pair['bytes_per_second'], pair['latency'])}"


def _rates(rate: float, delay: float) -> str:
    return f"{rate / 2**20:.0f} MiB/s and {delay * 1e3:.2f} ms"


def _versions(nodes: Sequence[Facts]) -> Check:
    """Whether all nodes have the same versions; node 0's are the measure."""
    first = nodes[0]
    differ = [
        f"{node['host']} {difference}"
        for node in nodes[1:]
        for difference in differences(node["versions"], first["versions"], first["host"])
    ]
    lacks = [f"{node['host']} lacks {n}" for node in nodes for n, v in node["versions"].items() if v == "missing"]
    found = "; ".join([*differ, *lacks]) or ", ".join(
        f"{name} {version}" for name, version in first["versions"].items()
    )
    remedy = "use one environment for all nodes: a shared folder, a container, or `python` in the profile; look at PYTHONPATH"
    return Check("versions", not differ and not lacks, found, remedy)


def _clocks(nodes: Sequence[Facts]) -> Check:
    skew = {node["host"]: node["clock"] for node in nodes}
    off = {host: seconds for host, seconds in skew.items() if abs(seconds) > TIMEOUTS.clock_skew}
    return Check(
        "clocks",
        not off,
        "; ".join(
            f"{host} is {abs(s):.1f} s {'ahead of' if s > 0 else 'behind'} {nodes[0]['host']}"
            for host, s in off.items()
        )
        or f"at most {max(map(abs, skew.values())) * 1000:.0f} ms apart",
        "have the administrators see to its time service (chronyc tracking)",
    )


def _devices(nodes: Sequence[Facts]) -> Iterator[Check]:
    for node in nodes:
        if node["device"] == "cuda":
            seen, (enough, text) = node["devices"], _enough_gpus(node["devices"], node["ranks"])
            yield Check(
                "devices",
                enough,
                f"{node['host']}: {text} {seen['names']}, driver {seen['driver']}",
                "look at nvidia-smi there, and at gpu-bind in the profile",
            )
            if seen.get("faults"):
                text = f"{node['host']}: {'; '.join(seen['faults'])}"
                remedy = "report to the cluster administrators; slurm.exclude in the profile avoids it"
                yield Check("GPU health", False, text, remedy)
            if seen.get("warnings"):
                text = f"{node['host']}: {'; '.join(seen['warnings'])}"
                yield Check("GPU health", True, text, "report to the cluster administrators if it stays", note=True)


def _limits(nodes: Sequence[Facts]) -> Iterator[Check]:
    """Notes on nodes whose limits are too low; nodes with the same ones share a note."""
    hosts: dict[str, list[str]] = {}
    for node in nodes:
        for text in node.get("limits", []):
            hosts.setdefault(text, []).append(node["host"])
    for text, names in hosts.items():
        yield Check("limits", True, f"{', '.join(names)}: {text}", "raise the limit before a long run", note=True)


def _networks(nodes: Sequence[Facts]) -> Iterator[Check]:
    """The network of the nodes, if they have the same one, and a note on each thing that keeps NCCL from using it."""
    kinds: dict[str, list[str]] = {}
    hindrances: dict[str, list[str]] = {}
    for node in nodes:
        network = node.get("network") or {}
        kinds.setdefault(fabric.describe(network), []).append(node["host"])
        for text in fabric.warnings(network) if node["device"] == "cuda" else ():
            hindrances.setdefault(text, []).append(node["host"])
    each = [f"{', '.join(hosts)}: {kind}" for kind, hosts in kinds.items()]
    remedy = "have the administrators look at the nodes with fewer or slower adapters; slurm.exclude in the profile avoids a node"
    yield Check("network", True, "; ".join(each) if len(each) > 1 else next(iter(kinds)), remedy, note=len(each) > 1)
    for text, hosts in hindrances.items():
        yield Check("network", True, f"{', '.join(hosts)}: {text}", "mend it before a long run", note=True)


def _enough_gpus(seen: Facts, ranks: int) -> tuple[bool, str]:
    """Whether a rank that sees these GPUs and the others of its node have one each, and the text about it."""
    shown, count = visible_devices(seen.get("visible")) or [], seen["count"]
    if count == len(shown) == 1 < ranks:  # MIG instances and bound GPUs: CUDA shows each rank its own
        return (
            True,
            f"each of {ranks} ranks can use {'a MIG instance' if shown[0].startswith('MIG-') else 'a GPU'} of its own",
        )
    if count > ranks:  # of a node that the job has for itself
        return True, f"{count} GPUs can be used, {ranks} are needed"
    return count == ranks, f"{count} of {ranks} GPUs can be used"


def _hub(nodes: Sequence[Facts]) -> Check:
    """Whether models and data sets can be had on all nodes alike; a note where only the Hub itself is out of reach."""
    hubs = [node["hub"] for node in nodes]
    absent = [node["host"] for node in nodes if not node["hub"]["there"]]
    unreached = [node["host"] for node in nodes if node["hub"]["reached"] is False]
    found = f"{hubs[0]['cache']}: " + (f"absent on {', '.join(absent)}" if absent else "on all nodes")
    if unreached:
        found += f"; huggingface.co cannot be reached from {', '.join(unreached)}"
    lost = bool(absent) and (len(absent) < len(nodes) or any(hub["chosen"] for hub in hubs))
    remedy = "set hub_cache in the profile to a shared folder, fill it on the login node, and set offline = true; or set proxy"
    return Check("hub", not lost, found, remedy, note=bool(unreached))


def of_each(run_dir: RunDir) -> Iterator[Check]:
    """What is wrong with single nodes, by what they left before they tried anything together."""
    files = sorted((run_dir.path / "doctor").glob("*.json"), key=lambda path: int(path.stem))
    nodes = [found for found in map(read_json, files) if found]
    if nodes:
        yield from (check for check in (_versions(nodes), *_devices(nodes)) if not check.ok)


def missing(run_dir: RunDir, nodes: int) -> Iterator[Check]:
    """What is known of the nodes that left no findings, from what they did leave."""
    address = (read_json(run_dir.rendezvous_file) or {}).get("address", "the address of node 0")
    for node in range(nodes):
        if (run_dir.path / "doctor" / f"{node}.json").exists():
            continue
        logs = sorted((run_dir.path / "submitit").glob(f"*_{node}_log.err"))
        last = next((line for log in logs for line in reversed(tail(log)) if line.strip()), "")
        said = f" Its last words: {last}" if last else ""
        if not run_dir.agent_log(node).exists():
            yield Check(
                f"node {node}",
                False,
                f"nothing of it appeared in {run_dir.path}.{said}",
                "is the runs folder the same one there? Are Python and `launch` at the same path? Does node_setup work there?",
            )
        elif node:
            yield Check(
                f"node {node}",
                False,
                f"it started, and sees {run_dir.path}, but did not get in touch with node 0.{said}",
                f"can it reach {address}? TCP ports 1024-65535 have to be open between the nodes",
            )
