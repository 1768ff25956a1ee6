"""How to open a node of a running run in an editor, over this machine."""

from __future__ import annotations

import os
import pwd
import shlex
import socket
from dataclasses import dataclass
from urllib.parse import quote

from launcher.client.inside.target import Target


@dataclass(frozen=True)
class EditorAccess:
    """What leads to a node.

    Attributes:
        ssh_config: lines for ``~/.ssh/config`` on the user's own machine; empty if the node is this machine.
        command: opens Visual Studio Code there.
        link: the same as a link.
        note: what the cluster has to allow; empty: nothing.
        shell: `launch shell`, which needs no ssh.
    """

    host: str
    folder: str
    ssh_config: str
    command: str
    link: str
    note: str
    shell: str


def editor_access(target: Target) -> EditorAccess:
    """Return what leads to the node of `target`; this asks nothing of the network."""
    host, login, name = target.host(target.node()), socket.gethostname(), target.name
    folder = str(target.run.dir.plan().cwd)
    user = pwd.getpwuid(os.geteuid()).pw_name
    local = target.alone or host == login
    choice = f" --node {target.node()}" if target.nodes else f" --rank {target.ranks[0]}" if any(target.ranks) else ""
    return EditorAccess(
        host=host,
        folder=folder,
        ssh_config="" if local else f"Host {host}\n    User {user}\n    ProxyJump {user}@{login}\n",
        command=f"code --remote ssh-remote+{host} {shlex.quote(folder)}",
        link=f"vscode://vscode-remote/ssh-remote+{quote(host)}{quote(folder)}",
        note="" if local else target.ssh_note(),
        shell=f"launch shell {shlex.quote(name)}{choice}",
    )
