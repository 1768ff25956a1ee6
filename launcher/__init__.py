"""Send one train/eval function to where the accelerators are: this machine, SLURM or Ray.

>>> import launcher
>>> run = launcher.launch("training.train:train", cpus=2)   # doctest: +SKIP
>>> run.wait().state                                        # doctest: +SKIP
<State.SUCCEEDED: 'succeeded'>
"""

from launcher.errors import BadRequest, LaunchError, RunFailed, RunStopped
from launcher.launch import launch, resume
from launcher.run import Run, runs
from launcher.spec import State

__all__ = ["BadRequest", "LaunchError", "Run", "RunFailed", "RunStopped", "State", "launch", "resume", "runs"]
