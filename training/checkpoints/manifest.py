"""Files of a checkpoint folder, and the manifest that verifies them.

Tensors by name are in `*.safetensors`, JSON values in `*.json`; nothing is pickled. The manifest holds the size and a
hash of each file and a hash of itself, to detect an incomplete or changed checkpoint. The hash of files is XXH3
(https://github.com/Cyan4973/xxHash): it detects damage as reliably as a cryptographic hash in a fifth of the time, but
does not detect deliberate manipulation.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from training.checkpoints.host_memory import HostTensor
from training.checkpoints.sharding import assemble, is_part
from training.errors import CheckpointError
from training.files import MAX_JSON_BYTES, NotPlain, open_plain, parse_json, read_plain, write_atomic

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
FORMAT = 2
HASHES: dict[int, tuple[str, Callable[[], Any]]] = {
    1: ("sha256", hashlib.sha256),
    FORMAT: ("xxh3_128", xxhash.xxh3_128),
}
"""Manifest format -> hash of files; format 1 can still be read."""
_CHUNK = 1 << 22  # bytes hashed and written at a time
_STEP_NAME = re.compile(r"step-([0-9]{9,18})")
_MAX_BYTES = 1 << 50  # of one file; larger than any real file


def step_of(name: str) -> int | None:
    """The step in the folder name of a committed checkpoint; None for another name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_plain_name(name: object) -> bool:
    """Whether `name` is a file name without a path: printable, no separator. Libraries write hidden files, too."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in (".", "..")
        and not set(name) & {"/", "\\"}
        and 0 < len(name.encode()) <= 255
        and name != MANIFEST
    )


def load(path: Path) -> dict[str, Any]:
    """Load the parts of the checkpoint in `path`, tensors on the CPU; sharded files are assembled.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from safetensors.torch import load_file

    names = list(read_manifest(path)["files"])
    parts: dict[str, Any] = dict(assemble(path, names))
    for name in names:
        if is_part(name):
            continue
        try:
            file = path / name
            os.close(open_plain(file))  # does not follow links
            parts[name] = load_file(file) if name.endswith(".safetensors") else json.loads(file.read_bytes())
        except Exception as error:  # safetensors has an exception type of its own
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    return parts


def verify(path: Path) -> None:
    """Compare all files with the manifest.

    Raises:
        CheckpointError: a file differs; the message names it.
    """
    manifest = read_manifest(path)
    kind, new = HASHES[manifest["format"]]
    for name, expected in manifest["files"].items():
        try:
            with os.fdopen(open_plain(path / name), "rb") as file:
                digest = hashlib.file_digest(file, new).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
        if digest != expected[kind]:
            raise CheckpointError(f"{path / name} is not what was written: its {kind} differs from the manifest's")


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write `body` and its own hash to the manifest of `folder`, and fsync the folder."""
    text = _spell({**body, "sha256": hashlib.sha256(_spell(body)).hexdigest()})
    write_atomic(folder / MANIFEST, text, 0o666)  # the same permissions as the tensor files


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the checkpoint in `path`.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    file = path / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{path} cannot be read: it is a symbolic link, which is not followed")
    try:
        raw = read_plain(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, so this is no committed checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    return parse_manifest(raw, str(file), path.name)


def parse_manifest(raw: bytes, where: str, folder: str = "") -> dict[str, Any]:
    """Parse and validate the manifest `raw` of the checkpoint folder named `folder`.

    Raises:
        CheckpointError: the hash differs, a field has a wrong type, a file name is not plain, or the step is not that of
            the folder name. The message names `where`.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} cannot be read: it is larger than {MAX_JSON_BYTES} bytes")
    try:
        manifest = parse_json(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = _spell(manifest) == raw and manifest["sha256"] == hashlib.sha256(_spell(body)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None
    if not whole:
        raise CheckpointError(f"{where} is not what was written: its sha256 differs")
    found = manifest.get("format")
    if type(found) is not int or found not in HASHES:
        known = " and ".join(map(str, HASHES))
        raise CheckpointError(f"{where} has format {str(found)[:40]}; this version reads formats {known}")
    if wrong := _fault(manifest, step_of(folder)):
        raise CheckpointError(f"{where} cannot be used: {wrong}")
    return dict(manifest)


def _fault(manifest: dict[str, Any], step: int | None) -> str:
    """The first invalid field of a manifest, as text; empty if all are valid."""
    said, score, files = manifest.get("step"), manifest.get("score", ...), manifest.get("files")
    if not _is_count(said):
        return f"its step is {str(said)[:40]!r}, and not a whole number"
    if step is not None and said != step:
        return f"its step is {said}, and its folder is that of step {step}"
    if score is not None and (type(score) not in (int, float) or abs(score) > 1e300):
        return "its score is neither a number nor null"
    if not isinstance(files, dict):
        return "its files are not a table"
    kind, new = HASHES[manifest["format"]]
    digits = 2 * new().digest_size
    for name, entry in files.items():
        if not is_plain_name(name):
            return f"{name[:80]!r} is not a plain file name"
        if not isinstance(entry, dict) or not _is_count(entry.get("bytes")):
            return f"the bytes of {name!r} are not a whole number up to {_MAX_BYTES}"
        if not isinstance(entry.get(kind), str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", entry[kind]):
            return f"the {kind} of {name!r} is none"
    return ""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES


def rankable(score: float | None) -> float | None:
    """`score` if it is finite, so that checkpoints can be ordered by it; else None."""
    return score if score is not None and math.isfinite(score) else None


def check_file(folder: Path, name: str, entry: dict[str, Any]) -> Path:
    """Return the path of a file of the manifest.

    Raises:
        CheckpointError: it is not a plain file, or has not the recorded size.
    """
    path = folder / name
    try:
        handle = open_plain(path)
    except NotPlain as error:
        raise CheckpointError(f"{path} cannot be read: it {error.strerror}") from None
    size = os.fstat(handle).st_size
    os.close(handle)
    if size != entry["bytes"]:
        raise CheckpointError(f"{path} is not what was written: it has {size} bytes, and not {entry['bytes']}")
    return path


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write, hash and fsync a file of bytes, or of tensors by name; returns its manifest entry."""
    kind, new = HASHES[FORMAT]
    digest, size = new(), 0
    if not is_plain_name(path.name):
        raise CheckpointError(f"{path.name[:80]!r} is not a plain file name, so no checkpoint can hold it")
    with os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb") as file:
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


def _safetensors(tensors: Mapping[str, torch.Tensor | HostTensor]) -> list[bytes | memoryview]:
    """The pieces of a safetensors file: header length (u64), JSON header padded to 8 bytes, tensor bytes.

    The library would first copy all tensors into one string. Format: https://github.com/huggingface/safetensors#format
    """
    from safetensors.torch import _TYPES

    names = {dtype: name for name, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes | memoryview] = []
    offset = 0
    # Widest types first, as in the library, so that all tensors are aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        host = tensor if isinstance(tensor, HostTensor) else HostTensor.of(tensor)
        end = offset + sum(piece.numel() for piece in host.pieces)
        header[name] = {"dtype": names[host.dtype], "shape": list(host.shape), "data_offsets": [offset, end]}
        pieces += [memoryview(piece.numpy()) for piece in host.pieces]  # type: ignore[arg-type]
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *pieces]
