"""Training, from a configuration and a prepared cache to a run folder."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simmp_fast.config import Config, ConfigError, to_mapping
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.loader import slice_loader
from simmp_fast.evaluation.evaluate import slice_dice
from simmp_fast.model import SimMPNet
from simmp_fast.model.pretrained import load_strict
from simmp_fast.training import rng
from simmp_fast.training.checkpoint import (
    WEIGHTS,
    Metadata,
    TrainingState,
    check_model_config,
    load_last,
    save_last,
    save_weights,
)
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.interrupt import StopRequest
from simmp_fast.training.log import RunLog
from simmp_fast.training.run_folder import RunFolder
from simmp_fast.training.step import TrainStep, make_optimizer
from simmp_fast.training.views import RunPictures


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step: training steps taken.
        epoch: epochs completed.
        best: best validation Dice, 0..1; None if none was measured.
        interrupted: whether a signal stopped it before its last epoch; then it can be resumed.
    """

    folder: Path
    step: int
    epoch: int
    best: float | None
    interrupted: bool


def train(
    config: Config, cache: Cache, run: str | Path, *, resume: bool = False, device: str | torch.device | None = None
) -> RunResult:
    """Train a network, or continue a run exactly where its last checkpoint stands.

    SIGINT and SIGTERM finish the current step, write `last` and return; a second signal acts at once.

    Args:
        config: the resolved configuration.
        cache: prepared data, with the classes, channels and size that `config.model` says.
        run: the run folder; must not exist, or be empty, unless `resume`.
        resume: continue the run in that folder. Its configuration may differ only in `run_folder.FREE_KEYS`.
        device: a CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigError: the configuration does not fit the data or the saved run, or the folder cannot be used.
        DataError: the cache or the checkpoint is damaged.
        TrainingError: a loss or gradient that is not finite, or a disk that is full.
    """
    check_data(config, cache)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if config.train.cuda_graph and place.type != "cuda":
        raise ConfigError(f"train.cuda_graph: got true on {place.type}, expected a CUDA device")
    records = {"data.json": to_mapping(cache.recipe), "splits.json": {"cache": cache.checksum, **cache.splits}}
    with RunFolder(run, config, records, resume=resume) as folder, StopRequest() as stop:
        runner = Run(config, cache, folder, place, stop)
        with runner.log:
            try:
                return runner.train()
            except (TrainingError, DataError) as error:
                runner.log.say(str(error))
                raise


def check_data(config: Config, cache: Cache) -> None:
    """Raise `ConfigError` unless the network was configured for the data in `cache`."""
    model = config.model
    for key, got, need in (
        ("classes", model.classes, len(cache.classes)),
        ("in_channels", model.in_channels, cache.channels),
        ("image_size", model.image_size, cache.image_size),
    ):
        if got != need:
            raise ConfigError(f"model.{key}: got {got}, expected {need} as the data set {cache.name!r} has")
    if not cache.splits.get("train"):
        raise ConfigError(f"data set {cache.name!r}: got no cases in the split 'train', expected at least one")


class Run:
    """One run: the network, its optimiser, and where they stand.

    Attributes:
        step: training steps taken.
        epoch: the epoch at work (0-based).
        batch: batches of it already taken.
        best: best validation Dice so far.
        reading_is_free: whether a value can be read without waiting for the device.
    """

    def __init__(
        self, config: Config, cache: Cache, run_folder: RunFolder, device: torch.device, stop: StopRequest
    ) -> None:
        folder = run_folder.path
        self.config, self.cache, self.folder, self.device, self.stop = config, cache, folder, device, stop
        self.step = self.epoch = self.batch = 0
        self.best: float | None = None
        self.reading_is_free = device.type == "cpu"
        self.validation = "validation" if cache.splits.get("validation") else None
        self.pictures = RunPictures(folder, cache, self.validation, config.train.overlays)

        rng.seed_all(config.train.seed)
        self.model: Any = SimMPNet(config.model, backend=config.train.backend)
        checkpoint = load_last(folder)
        if checkpoint is None:
            self._load_backbone()
        else:
            tensors, meta, state = checkpoint
            check_model_config(folder / WEIGHTS, meta.model, config.model)
            load_strict(self.model, tensors, str(folder / WEIGHTS))
        self.model.to(device).train()
        self.optimizer = make_optimizer(self.model, config.train)
        self.take_step = TrainStep(self.model, self.optimizer, config.train, device)
        if checkpoint is not None:
            self._restore(state)

        self.steps_per_epoch = len(self._loader(start_batch=0))
        run_folder.record()
        self.log = RunLog(
            folder,
            total_steps=config.train.epochs * self.steps_per_epoch,
            step=self.step,
            metrics_bytes=0 if checkpoint is None else state.metrics_bytes,
        )
        self.saved_at = time.monotonic()
        self.log.say(self._opening(resumed=checkpoint is not None))

    def _load_backbone(self) -> None:
        source = self.config.train.backbone_weights
        if source is not None:
            self.model.backbone.load_weights(f"timm:{self.config.model.backbone}" if source == "timm" else source)

    def _restore(self, state: TrainingState) -> None:
        self.step, self.epoch, self.batch, self.best = state.step, state.epoch, state.batch, state.best
        self.optimizer.load_state_dict(state.optimizer)
        for group in self.optimizer.param_groups:
            group["capturable"] = self.config.train.cuda_graph  # the saved run may have been set otherwise
        self.take_step.loss_sum.fill_(state.loss_sum)
        rng.restore(state.rng)

    def _opening(self, *, resumed: bool) -> str:
        verb = "resumed" if resumed else "started"
        text = f"{verb} at step {self.step}, epoch {self.epoch}: {self.cache.name} on {self.device}"
        if self.validation is None:
            text += "; no validation cases, so no best checkpoint is chosen"
        return text

    def _loader(self, start_batch: int) -> Any:
        train = self.config.train
        return slice_loader(
            self.cache,
            "train",
            train.batch_size,
            seed=train.seed,
            epoch=self.epoch,
            start_batch=start_batch,
            augment=train.augment,
            workers=train.workers,
        )

    def train(self) -> RunResult:
        """All epochs that are left."""
        while self.epoch < self.config.train.epochs and not self.stop.requested:
            self._train_epoch()
            if not self.stop.requested:
                self._finish_epoch()
        interrupted = self.epoch < self.config.train.epochs
        if interrupted:
            self._save_last()
            self.log.say(
                f"interrupted at step {self.step}, epoch {self.epoch}; everything is saved in {self.folder}: "
                "run the same command with --resume to go on from there"
            )
        return RunResult(self.folder, self.step, self.epoch, self.best, interrupted)

    def _train_epoch(self) -> None:
        """The batches that are left of this epoch, or as many as until a request to stop."""
        if self.batch == self.steps_per_epoch:
            return
        train = self.config.train
        wld = self.epoch >= train.wld_from and train.wld_every == "step"
        self.model.train()
        clock, counted = time.monotonic(), self.step
        states = rng.capture()
        batches = iter(self._loader(self.batch))
        rng.restore(states)  # a loader may draw a seed as it starts, which a resumed run would draw once more
        for images, labels in batches:
            loss = self.take_step(images, labels, self.step, wld=wld)
            self.step += 1
            self.batch += 1
            self.log.advance()
            logged = self.step % train.log_every == 0
            if logged or self.reading_is_free:
                self._check_finite()
            if logged:
                rate = (self.step - counted) * train.batch_size / (time.monotonic() - clock)
                self._log_step(float(loss), rate)
                clock, counted = time.monotonic(), self.step
            if self.stop.requested:
                return
            if time.monotonic() - self.saved_at > 60 * train.checkpoint_minutes:
                self._save_last()

    def _log_step(self, loss: float, images_per_second: float) -> None:
        self.log.row(
            "train",
            self.step,
            self.epoch,
            loss=loss,
            lr=self.config.train.lr,
            k=int(self.model.wld.k),
            memory=self.model.memory_phase,
            images_per_second=round(images_per_second, 2),
        )
        self.log.note(loss=f"{loss:.4g}", images_per_second=f"{images_per_second:.1f}")

    def _finish_epoch(self) -> None:
        """Validate, log, save. Until validation is over nothing changes, so an interrupted one is simply repeated."""
        self._check_finite()
        train = self.config.train
        last = self.epoch + 1 == train.epochs
        due = self.epoch >= train.validate_from and (self.epoch - train.validate_from) % train.validate_every == 0
        dice = self._validate() if self.validation is not None and (due or last) else None
        if self.stop.requested:
            return
        mean_loss = self.take_step.loss_sum / self.batch
        if train.wld_every == "epoch" and self.epoch >= train.wld_from:
            self.model.wld.step(mean_loss)
        self.log.row("epoch", self.step, self.epoch, mean_loss=float(mean_loss))
        text = f"epoch {self.epoch}: step {self.step}, mean loss {float(mean_loss):.4f}"
        if dice is not None:
            self.log.row("validation", self.step, self.epoch, dice=dice)
            text += f", validation Dice {dice:.4f}"
        self.log.say(text)
        self.epoch, self.batch = self.epoch + 1, 0
        self.take_step.loss_sum.zero_()
        if dice is not None and not math.isnan(dice) and (self.best is None or dice > self.best):
            self.best = dice
            save_weights(self.folder / "best.safetensors", self.model, self._metadata())
        if train.keep_every and self.epoch % train.keep_every == 0:
            save_weights(self.folder / f"epoch_{self.epoch:03d}.safetensors", self.model, self._metadata())
        self._save_last()
        if dice is not None:
            self.pictures.draw(self.model, self.log.path, train.precision, title=f"epoch {self.epoch - 1}")

    def _validate(self) -> float | None:
        """Mean foreground Dice of the validation slices; None if a signal came. Training flags are restored."""
        train = self.config.train
        with self.stop.at_once():
            return slice_dice(
                self.model, self.cache, "validation", batch_size=train.batch_size, precision=train.precision
            )
        return None

    def _check_finite(self) -> None:
        bad = self.take_step.guard.read()
        if bad is None:
            return
        good = self.folder / WEIGHTS
        kept = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint was written yet"
        raise TrainingError(
            f"step {bad.step}, epoch {self.epoch}: {bad.describe()} at learning rate {self.config.train.lr:g}. "
            f"That step was not taken and nothing was written; {kept}. "
            "Look at the data, or start a run with a lower train.lr or train.precision=float32"
        )

    def _metadata(self) -> Metadata:
        return Metadata(self.config.model, tuple(self.cache.classes), self.step, self.epoch)

    def _save_last(self) -> None:
        self._check_finite()
        state = TrainingState(
            step=self.step,
            epoch=self.epoch,
            batch=self.batch,
            loss_sum=float(self.take_step.loss_sum),
            best=self.best,
            metrics_bytes=self.log.synced_bytes(),
            optimizer=self.optimizer.state_dict(),
            rng=rng.capture(),
        )
        save_last(self.folder, self.model, self._metadata(), state)
        self.saved_at = time.monotonic()
