"""The folder of one training run: who may write to it, and what it records about the run.

config.yaml             the resolved configuration
data.json               what `predict` must know of the data: classes, channels, intensity rule, slice axis
splits.json             the cases of every split, and the checksum of the cache they came from
environment.json        versions, device, commit
train.log               what was said, with times
metrics.jsonl           one JSON object a line: training, epoch and validation rows
tensorboard/            the same numbers as TensorBoard events
curves.png              the same numbers as a picture
overlays.png            validation slices: image, truth, prediction
last.safetensors        newest weights            (checkpoint.py)
last.state.pt           the training state that belongs to them
best.safetensors        weights with the best validation Dice
epoch_050.safetensors   weights kept every n-th epoch
run.lock                process id and host of the process that trains here
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
import yaml

from simmp_fast.config import Config, ConfigError, from_mapping, read_json, read_yaml, to_mapping
from simmp_fast.data.errors import disk_errors
from simmp_fast.files import atomic_file, write_json
from simmp_fast.ranks import ALONE, Ranks

# Settings that change neither the weights nor the meaning of the rows already written, so a resumed run may differ.
FREE_KEYS = frozenset(
    f"train.{key}"
    for key in (
        "backbone_weights",
        "checkpoint_minutes",
        "cuda_graph",
        "epochs",
        "keep_every",
        "log_every",
        "overlays",
        "workers",
    )
)
_held: set[Path] = set()
_FAR = 2**30  # place in the lock file of the byte that Windows locks: nobody can read a locked one


def _lock(file: IO[str], hold: bool) -> None:
    """Take the system's lock on an open file, or give it back.

    Raises:
        BlockingIOError, PermissionError: another process holds it.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        msvcrt: Any = importlib.import_module("msvcrt")
        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK if hold else msvcrt.LK_UNLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB if hold else fcntl.LOCK_UN)


class FolderLock:
    """An exclusive lock on a folder, released by the system when its process ends, however it ends.

    A record lock (`lockf`; on Windows `msvcrt.locking`): unlike `flock` it is not inherited by data loading processes,
    which may outlive a killed trainer by seconds. It does not exclude the same process, hence `_held`.

    Raises:
        ConfigError: another process, or this one, holds the folder; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = (folder / "run.lock").resolve()
        if self.path in _held:
            raise ConfigError(f"{folder}: this process (pid {os.getpid()}) is already training there")
        try:
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the lock is held
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            _lock(self._file, hold=True)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown process"
            self._file.close()
            raise ConfigError(
                f"{folder}: run folder in use by {holder}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            self._file.close()
            raise ConfigError(f"{folder}: this file system cannot lock files ({error.strerror})") from None
        self._file.truncate(0)  # whoever is named there is dead: the lock was free
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        _held.add(self.path)

    def release(self) -> None:
        """Give the folder free. The file stays: removing it would let two processes lock two files."""
        if not self._file.closed:
            self._file.truncate(0)
            _lock(self._file, hold=False)
            self._file.close()
            _held.discard(self.path)


class RunFolder:
    """A locked run folder. Use as a context manager, or call `close`.

    Nothing but the lock is written before `record`: a run that fails before its first step leaves no run behind.

    Args:
        path: the folder; created if it does not exist.
        config: the resolved configuration.
        records: plain contents by file name (`data.json`, `splits.json`) that a resumed run must share.
        resume: continue the run that is in the folder.
        ranks: the processes of the run; the first alone touches the folder, and all raise what it finds.

    Raises:
        ConfigError: the folder is in use; it exists and `resume` is not set; there is nothing to resume; or the saved
            run differs in its configuration or data (the message lists the keys).
    """

    def __init__(
        self,
        path: str | Path,
        config: Config,
        records: Mapping[str, Mapping[str, Any]],
        *,
        resume: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.path = Path(path)
        self._config, self._records, self._ranks = config, records, ranks
        self._lock: FolderLock | None = None
        ranks.first(lambda: self._claim(resume))

    def _claim(self, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: got a file, expected a folder")
        with _usable(self.path):
            self._check_occupied(resume)
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        try:
            self._check_occupied(resume)  # once more: another run may have come and gone before the lock was taken
            if resume:
                self._check_same(self._config, self._records)
            with _usable(self.path):
                for leftover in self._leftovers():
                    leftover.unlink()
        except BaseException:
            self.close()
            raise

    def record(self) -> None:
        """Write configuration, records and environment. From then on the folder holds a run.

        Raises:
            DataError: the disk is full.
        """
        self._ranks.first(self._write_records)

    def _write_records(self) -> None:
        with disk_errors(self.path):
            write_json(self.path / "environment.json", environment())
            for name, content in self._records.items():
                write_json(self.path / name, content)
            with atomic_file(self.path / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(to_mapping(self._config), sort_keys=False), encoding="utf-8")

    def _check_occupied(self, resume: bool) -> None:
        found = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        found -= {"run.lock", *(path.name for path in self._leftovers())}
        # `config.yaml` is written last: without it, the records are what a process left that died as it began.
        found = found if "config.yaml" in found else found - {"environment.json", *self._records}
        if found and not resume:
            raise ConfigError(f"{self.path}: run folder exists; resume it (--resume) or choose another")
        if resume and "config.yaml" not in found:
            raise ConfigError(f"{self.path}: no run to resume there; leave out --resume to start one")

    def _leftovers(self) -> list[Path]:
        """Temporary files of `atomic_file` that a killed run could not remove."""
        return list(self.path.glob(".????????????-*"))

    def _check_same(self, config: Config, records: Mapping[str, Mapping[str, Any]]) -> None:
        saved = from_mapping(Config, read_yaml(self.path / "config.yaml"), f"{self.path}/config.yaml")
        if keys := [key for key in differing_keys(saved, config) if key not in FREE_KEYS]:
            changes = listed_differences(keys, saved, config)
            raise ConfigError(f"{self.path}: the run was started with other settings: {changes}")
        if config.train.epochs < saved.train.epochs:
            raise ConfigError(f"train.epochs: got {config.train.epochs}, expected at least {saved.train.epochs}")
        for name, content in records.items():
            old = read_json(self.path / name)
            new = json.loads(json.dumps(content))
            if keys := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
                raise ConfigError(
                    f"{self.path}: the run was started with other data, which differ in {', '.join(keys)} ({name})"
                )

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `ConfigError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be used as a run folder ({error.strerror or error})") from None


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def differing_keys(one: Any, other: Any) -> list[str]:
    """Dotted names of the fields in which two dataclasses of one type differ."""
    a, b = flatten(to_mapping(one)), flatten(to_mapping(other))
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def listed_differences(keys: list[str], saved: Any, given: Any) -> str:
    """``"train.lr is 0.001, saved as 0.0001; ..."`` for the keys of `differing_keys`."""
    old, new = flatten(to_mapping(saved)), flatten(to_mapping(given))
    return "; ".join(f"{key} is {new.get(key)!r}, saved as {old.get(key)!r}" for key in keys)


def environment() -> dict[str, Any]:
    """What a run depends on beside its configuration: versions, device, commit. Ready for JSON."""
    versions: dict[str, str | None] = {}
    for package in ("simmp-fast", "torch", "triton", "timm", "numpy", "scipy", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this package where it runs from its own checkout, marked if files were changed since."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
