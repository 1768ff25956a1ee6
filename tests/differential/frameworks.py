"""Programs of frameworks, unmodified, for the differential suite: what their users write, and what accelerate ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.differential.programs import INDENTED, LOOPBACK, Program, reporting

OFFLINE = {**LOOPBACK, "HF_HUB_OFFLINE": "1"}
ON_CPU = {**OFFLINE, "ACCELERATE_USE_CPU": "true"}
"""torchrun leaves the choice of the device to accelerate, which otherwise is not distributed on a CPU."""


def shipped(name: str) -> Program:
    """A script that accelerate ships for `accelerate test` and its own tests; it checks itself."""
    spec = importlib.util.find_spec("accelerate")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).parent / "test_utils" / "scripts" / f"{name}.py"
    return Program(script.read_text(), script=f"{name}.py", environment=ON_CPU)


LIGHTNING = """
import os, signal
import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

FOLDER = os.environ["OBSERVED"]
handlers = {}

@rank_zero_only
def only_once():
    open(os.path.join(FOLDER, "written-by-" + os.environ["RANK"]), "w").close()

class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_start(self):
        for name in ("SIGTERM", "SIGUSR1"):
            handlers[name] = type(signal.getsignal(getattr(signal, name))).__name__

data = torch.utils.data.DataLoader(torch.arange(64.0).reshape(16, 4) / 64, batch_size=2)
trainer = lightning.Trainer(
    accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
    max_epochs=2, default_root_dir=FOLDER, logger=False, enable_progress_bar=False, enable_model_summary=False,
)
net = Net()
trainer.fit(net, data)
only_once()
trainer.strategy.barrier()
saved = sorted(path for folder, _, names in os.walk(FOLDER) for path in names if not path.isdigit())
found = [
    trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size, trainer.is_global_zero, rank_zero_only.rank,
    type(trainer.strategy.cluster_environment).__name__, trainer.global_step, saved, handlers,
    [round(value, 5) for p in net.parameters() for value in p.flatten().tolist()],
]
trainer.strategy.barrier()  # the reports lie in the same folder
"""

FABRIC = """
import os, torch, lightning
fabric = lightning.Fabric(
    accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=int(os.environ["GROUP_WORLD_SIZE"])
)
fabric.launch()
model = torch.nn.Linear(2, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
total = fabric.all_reduce(torch.tensor(float(fabric.global_rank)), reduce_op="sum")
found = [fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size, float(total)]
fabric.barrier()
"""

TRAINER = """
import os, torch
from transformers import Trainer, TrainingArguments, set_seed

FOLDER = os.path.join(os.environ["OBSERVED"], "output")

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

set_seed(1)
data = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(32)]
arguments = TrainingArguments(
    output_dir=FOLDER, max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
)
trainer = Trainer(model=Net(), args=arguments, train_dataset=data, eval_dataset=data)
loss = trainer.train().training_loss
metrics = trainer.evaluate()
trainer.accelerator.wait_for_everyone()
found = [
    arguments.process_index, arguments.local_process_index, arguments.world_size, trainer.is_world_process_zero(),
    sorted(os.listdir(FOLDER)), round(loss, 5), round(metrics["eval_loss"], 5),
    [round(value, 5) for p in trainer.model.parameters() for value in p.flatten().tolist()],
]
trainer.accelerator.wait_for_everyone()
"""

HYDRA = """
import os, hydra
from hydra.core.hydra_config import HydraConfig

runs = []

@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    job = HydraConfig.get()
    output = job.runtime.output_dir
    runs.append([
        config.lr, config.model.name, list(job.overrides.task), job.job.name, os.getcwd() == job.runtime.cwd,
        os.path.relpath(output, job.runtime.cwd).split("/")[0], os.path.isfile(os.path.join(output, ".hydra", "config.yaml")),
    ])

main()
found = runs
"""

CONF = {"conf/config.yaml": "lr: 0.1\ndefaults:\n  - model: small\n  - _self_\n", "conf/model/small.yaml": "name: small\n",
        "conf/model/large.yaml": "name: large\n"}  # fmt: skip

JAX = """
import os, socket, time, jax

def address():
    path = os.path.join(os.environ["OBSERVED"], "address")
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        with open(path + ".new", "w") as file:
            file.write(f"{os.environ['MASTER_ADDR']}:{port}")
        os.rename(path + ".new", path)
    while not os.path.exists(path):
        time.sleep(0.05)
    return open(path).read()

if "SLURM_JOB_ID" in os.environ:
    jax.distributed.initialize()
else:
    jax.distributed.initialize(address(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
from jax.experimental import multihost_utils
gathered = multihost_utils.process_allgather(jax.numpy.array([float(jax.process_index())]))
found = [jax.process_index(), jax.process_count(), len(jax.devices()), len(jax.local_devices()), gathered.flatten().tolist()]
jax.distributed.shutdown()
"""

SPAWN = """
def child(number, folder, rank):
    import torch, torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{rank}", rank=number, world_size=2)
    value = torch.tensor(float(number + 1))
    dist.all_reduce(value)
    open(f"{folder}/sum-{rank}-{number}", "w").write(str(value.item()))
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    import os, torch.multiprocessing
    folder, rank = os.environ["OBSERVED"], os.environ["RANK"]
    torch.multiprocessing.spawn(child, (folder, rank), nprocs=2)
    found = [open(f"{folder}/sum-{rank}-{number}").read() for number in range(2)]
"""

LOADER = """
if __name__ == "__main__":
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        return StatefulDataLoader(list(range(12)), batch_size=2, num_workers=2, shuffle=True,
                                  generator=torch.Generator().manual_seed(5))

    first = loader()
    batches = iter(first)
    before = [next(batches).tolist() for _ in range(3)]
    state = first.state_dict()
    rest = [batch.tolist() for batch in batches]
    second = loader()
    second.load_state_dict(state)
    found = [before, rest, [batch.tolist() for batch in second] == rest]
"""

SHARDED = """
import os, torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(2, 8) * dist.get_rank()).sum().backward()
optimizer.step()
folder = os.path.join(os.environ["OBSERVED"], "checkpoint")
dcp.save(model.state_dict(), checkpoint_id=folder)
loaded = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
dcp.load(loaded, checkpoint_id=folder)
full = {name: value.full_tensor() for name, value in model.state_dict().items()}
found = [
    {name: round(value.sum().item(), 4) for name, value in full.items()},
    all(torch.equal(loaded[name].full_tensor(), value) for name, value in full.items()),
    [list(p.to_local().shape) for p in model.parameters()], sorted(os.listdir(folder)),
]
dist.barrier()
dist.destroy_process_group()
"""

METRIC = """
import torch, torch.distributed as dist, torchmetrics
dist.init_process_group("gloo")
metric = torchmetrics.classification.MulticlassAccuracy(num_classes=4, average="micro")
metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, dist.get_rank() % 4]))
found = [round(metric.compute().item(), 5), torchmetrics.utilities.prints.rank_zero_only.rank]
dist.barrier()
dist.destroy_process_group()
"""

FRAMEWORKS: dict[str, Program] = {
    "accelerate test_cli": Program("", module="accelerate.test_utils.scripts.test_cli", environment=ON_CPU),
    "accelerate test_ops": shipped("test_ops"),
    "accelerate test_sync": shipped("test_sync"),
    "accelerate test_script": shipped("test_script"),
    "lightning": reporting(LIGHTNING, environment=OFFLINE),
    "lightning fabric": reporting(FABRIC, environment=OFFLINE),
    "torchmetrics": reporting(METRIC, environment=OFFLINE),
    "transformers trainer": reporting(TRAINER, environment=ON_CPU),
    "torch spawn": Program(f"{SPAWN}    {INDENTED}\n", environment=LOOPBACK),
    "torch fsdp2 and dcp": reporting(SHARDED, environment=LOOPBACK),
    "torchdata": Program(f"{LOADER}    {INDENTED}\n"),
    "hydra": reporting(HYDRA, files=CONF, args=("lr=0.2", "model=large", "+extra.x=[1,2]")),
    "hydra module": reporting(HYDRA, script="package/program.py", module="package.program", args=("lr=0.3",),
                              files={"package/__init__.py": "", **{f"package/{name}": text for name, text in CONF.items()}}),
    "hydra multirun": reporting(HYDRA, files=CONF, args=("--multirun", "lr=0.1,0.2")),
    "hydra unknown override": reporting(HYDRA, files=CONF, args=("no_such_key=1",), fails=True),
    "jax": reporting(JAX, environment={"JAX_PLATFORMS": "cpu"}),
}  # fmt: skip
"""By name. A script of accelerate reports nothing; whether it fails, and with which exception, is compared."""
