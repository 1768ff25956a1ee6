"""What lies in the folder of a checkpoint: its files, and a manifest by which every byte of them is checked.

Tensors by name are in `*.safetensors`, JSON values in `*.json`; nothing is pickled. The manifest holds the bytes and a
hash of each file, and a hash of its own, so that a torn or changed checkpoint is told from a whole one. The hash of files
is XXH3 (https://github.com/Cyan4973/xxHash), which finds damage as surely as a cryptographic one and takes a fifth of the
time that training would have to give for it; it is no proof against somebody who means to deceive.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from training.errors import CheckpointError
from training.files import write_atomic
from training.sharding import assemble, is_part

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
FORMAT = 2
HASHES: dict[int, tuple[str, Callable[[], Any]]] = {
    1: ("sha256", hashlib.sha256),
    FORMAT: ("xxh3_128", xxhash.xxh3_128),
}
"""What files are hashed with, by the format of the manifest: the present one, and that of before, which is read still."""
_CHUNK = 1 << 22  # bytes hashed and written at a time


def load(path: Path) -> dict[str, Any]:
    """The parts of the checkpoint in `path`, tensors on the CPU; files saved in parts under their whole name.

    Raises CheckpointError for a file it cannot read.
    """
    from safetensors.torch import load_file

    names = list(read_manifest(path)["files"])
    parts: dict[str, Any] = dict(assemble(path, names))
    for name in names:
        if is_part(name):
            continue
        try:
            file = path / name
            parts[name] = load_file(file) if name.endswith(".safetensors") else json.loads(file.read_bytes())
        except Exception as error:  # safetensors has its own kind of error
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    return parts


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless every file of the checkpoint has the bytes it was written with."""
    manifest = read_manifest(path)
    kind, new = HASHES[manifest["format"]]
    for name, expected in manifest["files"].items():
        try:
            with (path / name).open("rb") as file:
                digest = hashlib.file_digest(file, new).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
        if digest != expected[kind]:
            raise CheckpointError(f"{path / name} is not what was written: its {kind} differs from the manifest's")


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write `body` and its own hash to the manifest of `folder`, and fsync the folder."""
    write_atomic(folder / MANIFEST, _spell({**body, "sha256": hashlib.sha256(_spell(body)).hexdigest()}))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `path`. Raises CheckpointError where it is absent or not as written."""
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, so this is no committed checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    return parse_manifest(raw, str(file))


def parse_manifest(raw: bytes, where: str) -> dict[str, Any]:
    """The manifest with the bytes `raw`. Raises CheckpointError, naming `where`, unless every byte is as written."""
    try:
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = _spell(manifest) == raw and manifest["sha256"] == hashlib.sha256(_spell(body)).hexdigest()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None
    if not whole:
        raise CheckpointError(f"{where} is not what was written: its sha256 differs")
    if manifest["format"] not in HASHES:
        known = " and ".join(map(str, HASHES))
        raise CheckpointError(f"{where} has format {manifest['format']}; this version reads formats {known}")
    return dict(manifest)


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write a file, fsynced, hashing what goes out; the manifest's entry for it."""
    kind, new = HASHES[FORMAT]
    digest, size = new(), 0
    with path.open("wb") as file:
        for piece in (content,) if isinstance(content, bytes) else _safetensors(content):
            for at in range(0, len(piece), _CHUNK):
                chunk = piece[at : at + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, kind: digest.hexdigest()}


def _spell(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    """The pieces of a safetensors file: header length (u64), JSON header padded to 8 bytes, the tensors' bytes.

    Written here rather than by the library, which would copy all tensors into one string first. Format:
    https://github.com/huggingface/safetensors#format
    """
    import torch
    from safetensors.torch import _TYPES

    names = {dtype: name for name, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes | memoryview] = []
    offset = 0
    # Widest types first, as the library sorts, so that every tensor stays aligned in the file.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        pieces.append(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *pieces]
