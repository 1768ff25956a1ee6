"""Which files are code, configuration, data or secrets, by their names alone."""

from __future__ import annotations

import os
import re

CODE = (".py", ".pyi", ".so", ".pyd", ".pyx", ".cu", ".cpp", ".c", ".h")
CONFIG = (".toml", ".yaml", ".yml", ".cfg", ".ini", ".sh", ".json")

MAX_FILE = 32 * 2**20
"""Bytes of a file that is copied; a larger one is linked."""

MAX_CONFIG = 2**20
"""Bytes of a file that counts as configuration; a larger one is data."""

SECRET = re.compile(
    r"\.env(?!\.(?:example|sample|template|dist)$)(?:[._-].*)?|.*\.env|.*\.(?:pem|key|p12|pfx|jks|keystore|kdbx|ppk|token|gpg|asc)"
    r"|id_(?:rsa|dsa|ecdsa|ed25519)(?:[._-].*)?|\.(?:netrc|pypirc|npmrc|pgpass|htpasswd|git-credentials)|kaggle\.json"
    r"|.*(?:credential|secret|passwd|password|service[_-]?account|api[_-]?key|auth[_-]?token).*\.[a-z]+|(?:credentials?|secrets?|token)",
    re.IGNORECASE,
)
"""Names of files that hold passwords, tokens or private keys."""


def is_secret(name: str) -> bool:
    """Whether the file `name`, which git does not track, is taken for a secret; of modules, only ``secrets`` and the like."""
    base = os.path.basename(name)
    if base.endswith(CODE):
        return re.fullmatch(r"_?(?:local_)?(?:secrets?|credentials?|passwords?)\.py", base) is not None
    return SECRET.fullmatch(base) is not None


def is_code(name: str) -> bool:
    return name.endswith(CODE)


def travels(name: str, size: int, tracked: bool) -> bool:
    """Whether the file is copied; all others are linked."""
    if tracked:
        return size <= MAX_FILE
    if is_secret(name):
        return False
    return size <= MAX_FILE if is_code(name) else name.endswith(CONFIG) and size <= MAX_CONFIG
