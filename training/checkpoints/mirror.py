"""Copy checkpoints to a store in the background: S3, GCS, or another file system of fsspec.

    <uri>/<run name>/step-000000500/{model.safetensors, ..., manifest.json}

The manifest is written last and holds hashes of all files and of itself; a checkpoint without a valid manifest is
ignored. Only rank 0 writes to the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from training.checkpoints.manifest import MANIFEST, check_file, parse_manifest, rankable, step_of, verify
from training.checkpoints.store import Checkpoint, kept
from training.errors import CheckpointError, ConfigError
from training.files import MAX_JSON_BYTES, read_plain, sync_folder

T = TypeVar("T")
RETRIES = 5  # attempts of one operation
FIRST_WAIT = 0.5  # seconds before the second attempt; doubled each time


class Mirror:
    """Copies of the checkpoints of one run at `uri`.

    `on_mirrored(step)` and `on_failed(step, error)` are called from the mirror's thread.
    """

    def __init__(self, uri: str, run_name: str, *, keep: int = 2) -> None:
        """Open the store. Raises ConfigError if the URI is invalid or its package is missing."""
        self._fs, root = open_store(uri)
        self._root = f"{root.rstrip('/')}/{run_name}"
        self._uri = uri
        self.keep = keep
        self.on_mirrored: Callable[[int], None] = lambda step: None
        self.on_failed: Callable[[int, Exception], None] = lambda step, error: None
        self.on_damaged: Callable[[CheckpointError], None] = lambda error: None
        self._queue: queue.Queue[Path | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Write and delete an object of one byte. Raises ConfigError if the store cannot be read or written."""
        try:
            retried(self._names)
            retried(self._write_probe)
        except Exception as error:  # each file system has its own exceptions
            raise ConfigError(
                f"--mirror {self._uri}: the store cannot be read and written ({type(error).__name__}: {error}); "
                "check the address, that the bucket exists, and the credentials"
            ) from error

    def _write_probe(self) -> None:
        if self._root.startswith("/"):  # a local folder; object stores have none, and the bucket must not be created
            self._fs.makedirs(self._root, exist_ok=True)
        probe = f"{self._root}/.probe-{secrets.token_hex(8)}"
        self._fs.pipe_file(probe, b"?")
        self._fs.rm_file(probe)

    def push(self, checkpoint: Checkpoint) -> None:
        """Queue a committed checkpoint for the mirror's thread, which copies in the order of the calls."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()
        self._queue.put(checkpoint.path)

    def close(self) -> None:
        """Wait until all queued copies are done or have failed."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints in the store, oldest first, not verified; `path` is the name in the store."""
        found = []
        for name in retried(self._names):
            manifest = self._manifest(name)
            if manifest is not None:
                found.append(Checkpoint(manifest["step"], Path(name), rankable(manifest["score"])))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def pull(self, name: str, folder: Path) -> Path:
        """Download the checkpoint `name` to `folder`, verify it and commit it by one rename.

        Raises CheckpointError if the download fails or is damaged; it is then removed.
        """
        if step_of(name) is None:
            raise CheckpointError(f"{name!r} is not the name of a checkpoint")
        target, staging = folder / name, folder / f".{name}.pull-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            raw = self._read_manifest(name)
            where = f"{self._root}/{name}"
            for file, entry in parse_manifest(raw, f"{where}/{MANIFEST}", name)["files"].items():
                self._check_object(f"{where}/{file}", entry["bytes"], entry["bytes"])
                retried(
                    lambda file=file: self._fs.get_file(f"{where}/{file}", str(staging / file))  # type: ignore[misc]
                )
            (staging / MANIFEST).write_bytes(raw)
            verify(staging)
            if target.is_symlink():
                target.unlink()
            elif target.exists():  # the caller pulls only if this one is missing or damaged
                shutil.rmtree(target)
            os.rename(staging, target)
            sync_folder(folder)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self._uri}: {name} cannot be fetched: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def _work(self) -> None:
        while (path := self._queue.get()) is not None:
            step = step_of(path.name) or 0
            try:
                self._upload(path)
                self._prune()
            except FileNotFoundError as error:
                if path.exists():
                    self.on_failed(step, error)
                # else: pruned in the meantime, so a newer checkpoint is in the queue
            except Exception as error:
                self.on_failed(step, error)
            else:
                self.on_mirrored(step)

    def _upload(self, path: Path) -> None:
        there = f"{self._root}/{path.name}"
        raw = read_plain(path / MANIFEST)
        manifest = parse_manifest(raw, str(path / MANIFEST), path.name)
        files = {file: check_file(path, file, entry) for file, entry in manifest["files"].items()}
        retried(lambda: self._fs.makedirs(there, exist_ok=True))
        for file, source in files.items():
            retried(lambda file=file, source=source: self._fs.put_file(str(source), f"{there}/{file}"))  # type: ignore[misc]
        retried(lambda: self._fs.pipe_file(f"{there}/{MANIFEST}", raw))
        back = retried(lambda: self._fs.cat_file(f"{there}/{MANIFEST}"))
        if hashlib.sha256(back).digest() != hashlib.sha256(raw).digest():
            raise CheckpointError(f"{there}/{MANIFEST} is not what was written")

    def _prune(self) -> None:
        whole = self.checkpoints()
        names = {checkpoint.path.name for checkpoint in kept(whole, self.keep)}
        for name in retried(self._names):
            if name not in names:
                there = f"{self._root}/{name}"
                with contextlib.suppress(
                    FileNotFoundError
                ):  # first, so that an interrupted removal leaves no incomplete checkpoint
                    retried(lambda there=there: self._fs.rm_file(f"{there}/{MANIFEST}"))  # type: ignore[misc]
                with contextlib.suppress(FileNotFoundError):
                    retried(lambda there=there: self._fs.rm(there, recursive=True))  # type: ignore[misc]

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]
        return [name for name in names if step_of(name) is not None]

    def _manifest(self, name: str) -> dict[str, Any] | None:
        path = f"{self._root}/{name}/{MANIFEST}"
        try:
            return parse_manifest(self._read_manifest(name), path, name)
        except FileNotFoundError:  # upload incomplete
            return None
        except CheckpointError as error:
            self.on_damaged(error)
            return None

    def _read_manifest(self, name: str) -> bytes:
        path = f"{self._root}/{name}/{MANIFEST}"
        self._check_object(path, 0, MAX_JSON_BYTES)
        return bytes(retried(lambda: self._fs.cat_file(path)))

    def _check_object(self, path: str, least: int, most: int) -> None:
        """Raise CheckpointError unless `path` is a plain object of `least` to `most` bytes."""
        found = retried(lambda: self._fs.info(path))
        size = found.get("size")
        if found.get("type") != "file" or found.get("islink"):
            raise CheckpointError(f"{path} cannot be read: it is a link, a folder, a pipe or a device")
        if not isinstance(size, int) or not least <= size <= most:
            raise CheckpointError(f"{path} is not what was written: it has {size} bytes, and not {least} to {most}")


def retried(operation: Callable[[], T]) -> T:
    """Call `operation` up to RETRIES times, with exponential backoff; raises the last error.

    FileNotFoundError and PermissionError are raised at once, since a retry does not help.
    """
    for attempt in range(RETRIES):
        try:
            return operation()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:
            if attempt == RETRIES - 1:
                raise
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable")


def open_store(uri: str) -> tuple[Any, str]:
    """The file system of `uri`, and the path in it.

    Raises:
        ConfigError: the scheme of the URI is unknown, or its package is not installed.
    """
    try:
        import fsspec  # type: ignore[import-untyped]

        fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"--mirror {uri}: {error}") from None
    except ValueError as error:
        raise ConfigError(
            f"--mirror {uri}: {error}; write it as s3://bucket/folder, gs://bucket/folder or file:///folder"
        ) from None
    return fs, str(root)
