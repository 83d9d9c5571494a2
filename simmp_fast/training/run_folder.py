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
last.state.pt           the training state that belongs to them; it holds what the records above say, too
previous.safetensors    the weights of the checkpoint before it
previous.state.pt       their training state
best.safetensors        weights with the best validation Dice
epoch_050.safetensors   weights kept every n-th epoch
run.lock                process id and host of the process that trains here

A folder holds a run from its first checkpoint on, which is written after the first step. Before that it may be started
again with other settings; from then on a resumed run must agree with what the checkpoint was made with.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from simmp_fast.config import Config, ConfigError, from_mapping, read_json, read_yaml, to_mapping
from simmp_fast.data.errors import DataError, disk_errors
from simmp_fast.differences import differences, flatten, listed
from simmp_fast.files import atomic_file, remove_leftovers, write_json
from simmp_fast.messages import why_no_file
from simmp_fast.ranks import ALONE, Ranks
from simmp_fast.training.checkpoint import (
    PENDING,
    PREVIOUS_STATE,
    STATE,
    Checkpoint,
    TrainingState,
    checkpoint_files,
    go_back,
    load_last,
    load_previous,
    read_state,
)
from simmp_fast.training.environment import environment
from simmp_fast.training.lock import FolderLock
from simmp_fast.training.log import check_metrics, read_metrics

Resume = bool | Literal["last", "previous"]

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
        "rank_timeout_minutes",
        "workers",
    )
)
_WAY_OUT = "restore it, or remove it, and --resume writes it again from the checkpoint"
_CONFIG, _ENVIRONMENT, _METRICS = "config.yaml", "environment.json", "metrics.jsonl"
# What a run leaves that ends before its first checkpoint, and what a new volume has.
_BEGUN = {"run.lock", "train.log", "tensorboard", _METRICS, PENDING, "lost+found"}


class RunFolder:
    """A locked run folder. Use as a context manager, or call `close`.

    Nothing but the lock is written before `record`: a run that fails before its first step leaves no run behind.

    Args:
        path: the folder; created if it does not exist.
        config: the resolved configuration.
        records: plain contents by file name (`data.json`, `splits.json`) that a resumed run must share.
        resume: continue the run that is in the folder, from its last checkpoint or from the one before it.
        ranks: the processes of the run; the first alone touches the folder, and all raise what it finds.

    Attributes:
        path: the folder.
        config, records: as given, the records as JSON has them.
        environment: what `environment.environment` says of this process.
        notes: what a resumed run should say, on the first rank.

    Raises:
        ConfigError: the folder is in use; it holds a run and `resume` is not set; there is nothing to resume; or the
            saved run differs in its configuration or data (the message lists the keys).
        DataError: a file of the checkpoint is missing or damaged.
    """

    def __init__(
        self,
        path: str | Path,
        config: Config,
        records: Mapping[str, Mapping[str, Any]],
        *,
        resume: Resume = False,
        ranks: Ranks = ALONE,
    ) -> None:
        if resume not in (False, True, "last", "previous"):
            raise ConfigError(f"resume: got {resume!r}, expected True, False, 'last' or 'previous'")
        self.path, self.config = Path(path), config
        self.records: dict[str, dict[str, Any]] = json.loads(json.dumps(records))
        self.environment = environment(ranks.size)
        self.notes: list[str] = []
        self._ranks = ranks
        self._lock: FolderLock | None = None
        self._checkpoint = ranks.first(lambda: self._claim(resume))

    def take_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, on every rank; None for a new run. It is kept here no longer."""
        checkpoint, self._checkpoint = self._checkpoint, None
        return checkpoint

    def check_in_place(self) -> None:
        """Raise `TrainingError` if the folder was moved or removed while the run wrote there."""
        if self._lock is not None:
            self._lock.check_in_place()

    def record(self) -> None:
        """Write configuration, records and environment.

        Raises:
            DataError: the disk is full.
        """
        self._ranks.first(self._write_records)

    def _write_records(self) -> None:
        for name, content in ((_ENVIRONMENT, self.environment), *self.records.items()):
            with disk_errors(self.path / name):
                write_json(self.path / name, content, make_parents=False)
        path = self.path / _CONFIG
        with disk_errors(path), atomic_file(path, make_parents=False) as temporary:
            temporary.write_text(yaml.safe_dump(to_mapping(self.config), sort_keys=False), encoding="utf-8")

    def _claim(self, resume: Resume) -> Checkpoint | None:
        with _usable(self.path):
            if not self.path.is_dir() and (self.path.exists() or self.path.is_symlink()):
                what = "a file" if self.path.exists() else "a link to nothing"
                raise ConfigError(f"{self.path}: got {what}, expected a folder")
            self._check_contents(resume)
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        try:
            with _usable(self.path):
                self._check_contents(resume)  # once more: another run may have come and gone before the lock was taken
                remove_leftovers(self.path)
            return self._load(resume) if resume else None
        except BaseException:
            self.close()
            raise

    def _check_contents(self, resume: Resume) -> None:
        """Refuse a folder that holds a run, unless it is to be resumed, and one that holds something else.

        Hidden files are the user's or the system's: they are no obstacle, and stay.
        """
        entries = self.path.iterdir() if self.path.is_dir() else ()
        found = {entry.name for entry in entries if not entry.name.startswith(".")}
        if checkpoint_files(self.path) or self._has_rows():
            if not resume:
                raise ConfigError(f"{self.path}: run folder exists; resume it (--resume) or choose another")
            return
        begun = _BEGUN | ({_ENVIRONMENT, _CONFIG, *self.records} if self._has_environment() else set())
        if others := sorted(found - begun):
            raise ConfigError(
                f"{self.path}: got a folder with {', '.join(others[:5])}, which is no run to resume, expected a run "
                "folder, an empty one or none; choose another"
            )
        if resume and not found:
            raise ConfigError(f"{self.path}: no run to resume there; leave out --resume to start one")

    def _has_environment(self) -> bool:
        """Whether the environment is there that a run writes before its records; without it, such names are others'."""
        try:
            versions = read_json(self.path / _ENVIRONMENT).get("versions")
        except ConfigError:
            return False
        return isinstance(versions, dict) and "simmp-fast" in versions

    def _has_rows(self) -> bool:
        """Whether metrics are there of more than the first step, whose rows come before the first checkpoint."""
        path = self.path / _METRICS
        return path.exists() and any(row.get("step") not in (0, 1) for row in read_metrics(path))

    def _load(self, resume: Resume) -> Checkpoint | None:
        """The checkpoint to go on from, once it agrees with the folder and with what was given."""
        back = resume == "previous"
        checkpoint = load_previous(self.path) if back else load_last(self.path)
        if checkpoint is None:
            if self._has_rows():
                raise DataError(
                    f"{self.path / STATE}: missing, and all other checkpoints, while {_METRICS} has rows of a run: "
                    "restore them, or start a run in another folder"
                )
            return None
        state = checkpoint[2]
        self._check_records(state)
        self._check_config(from_mapping(Config, state.config))
        metrics = self.path / _METRICS
        if state.metrics_bytes and not os.path.lexists(metrics):
            self.notes.append(f"{metrics}: missing; its rows are lost, and those from here on are written")
            checkpoint = (*checkpoint[:2], replace(state, metrics_bytes=0, metrics_sha256=""))
        else:
            check_metrics(metrics, state.metrics_bytes, state.metrics_sha256)
        if changed := differences(state.environment, json.loads(json.dumps(self.environment))):
            self.notes.append(f"environment: {listed(changed)}; the last bits of the results may differ")
        if back:
            go_back(self.path)
        return checkpoint

    def _check_records(self, state: TrainingState) -> None:
        """Compare the records in the folder with those the checkpoint was made with, and these with the data given."""
        for name, saved in ((_CONFIG, state.config), *state.records.items()):
            path = self.path / name
            if not path.exists():
                self.notes.append(f"{path}: missing; written again from the checkpoint")
            else:
                _check_record(path, saved)
        for name, given in self.records.items():
            if changed := differences(state.records.get(name, {}), given):
                raise ConfigError(f"{self.path}: the run was started with other data ({name}): {listed(changed)}")

    def _check_config(self, saved: Config) -> None:
        changed = differences(to_mapping(saved), to_mapping(self.config))
        if fixed := {key: pair for key, pair in changed.items() if key not in FREE_KEYS}:
            raise ConfigError(f"{self.path}: the run was started with other settings: {listed(fixed)}")
        if self.config.train.epochs < saved.train.epochs:
            raise ConfigError(f"train.epochs: got {self.config.train.epochs}, expected at least {saved.train.epochs}")
        if changed:
            self.notes.append(f"settings: {listed(changed)}")

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def saved_config(folder: Path, resume: Resume = "last") -> dict[str, Any] | None:
    """The configuration of the run in a folder, to be laid under what a resumed run is given; None if there is none.

    It is that of `config.yaml`, or of the checkpoint to resume from where that file is missing.

    Raises:
        ConfigError: `config.yaml` cannot be read, or differs from the checkpoint.
    """
    path, state = folder / _CONFIG, folder / (PREVIOUS_STATE if resume == "previous" else STATE)
    saved = None
    if why_no_file(state) is None:
        with contextlib.suppress(DataError):  # said when the folder is opened, with what can be done
            saved = read_state(state).config
    if not path.exists():
        return saved
    if saved is not None:
        _check_record(path, saved)
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path) if path.name == _CONFIG else read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_WAY_OUT}") from None


def _resolved(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        return flatten(to_mapping(from_mapping(Config, content)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {_WAY_OUT}") from None


def _check_record(path: Path, saved: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a record in the folder says otherwise than the checkpoint."""
    if changed := _differences_in(path, saved):
        raise ConfigError(f"{path}: differs from what the checkpoint was made with: {listed(changed)}; {_WAY_OUT}")


def _differences_in(path: Path, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a record in the folder says otherwise than the checkpoint. Free settings may differ, but not be missing."""
    found = _read(path)
    if path.name != _CONFIG:
        return differences(saved, found)
    # Settings as they are understood: 1e-3 is a text to YAML, and a later version may know more of them.
    stated, one, other = flatten(found).keys(), _resolved(saved, path), _resolved(found, path)
    expected = stated | flatten(saved).keys()
    changed = differences(
        {key: value for key, value in one.items() if key in expected},
        {key: value for key, value in other.items() if key in stated},
    )
    return {key: pair for key, pair in changed.items() if key not in FREE_KEYS or key not in stated}


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `ConfigError` that names the folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, (ConfigError, DataError)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(folder)[:200]}: cannot be used as a run folder ({reason})") from None
