"""Training, from a configuration and a prepared cache to a run folder."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmp_fast.config import Config, to_mapping
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.loader import slice_loader, worker_errors
from simmp_fast.evaluation.evaluate import case_dice
from simmp_fast.model import SimMPNet
from simmp_fast.model.pretrained import load_strict
from simmp_fast.ranks import Ranks
from simmp_fast.training import rng
from simmp_fast.training.checkpoint import (
    PREVIOUS,
    WEIGHTS,
    Metadata,
    TrainingState,
    check_model_config,
    previous_step,
    save_last,
    save_weights,
)
from simmp_fast.training.checks import check_data, check_device
from simmp_fast.training.compiling import compile_errors
from simmp_fast.training.distributed import check_ranks, join_ranks, prepare_model, rank_errors, share_random_state
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.interrupt import StopRequest
from simmp_fast.training.log import RunLog, SilentLog
from simmp_fast.training.run_folder import Resume, RunFolder
from simmp_fast.training.step import TrainStep, WidthChange, make_optimizer
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
    config: Config, cache: Cache, run: str | Path, *, resume: Resume = False, device: str | torch.device | None = None
) -> RunResult:
    """Train a network, or continue a run exactly where its last checkpoint stands.

    Started by `torchrun` in several processes, all of them train one network (docs/distributed.md).

    SIGINT, SIGTERM and SIGHUP finish the current step, write `last` and return; a second SIGINT acts at once (not under
    `torchrun`).

    Args:
        config: the resolved configuration.
        cache: prepared data, with the classes, channels and size that `config.model` says.
        run: the run folder; must hold no checkpoint and nothing else unless `resume`.
        resume: continue the run in that folder; its configuration may differ only in `run_folder.FREE_KEYS`. "previous"
            goes back to the checkpoint before the last. A run that ended before its first checkpoint begins anew.
        device: a CUDA GPU if there is one, else the CPU. Each of several processes takes its own GPU.

    Raises:
        ConfigError: the configuration does not fit the data, the saved run or the number of processes, or the folder
            cannot be used.
        DataError: the cache or the checkpoint is damaged, or files of it are missing.
        TrainingError: a loss or gradient that is not finite, a disk that is full, a run folder that was moved, or
            another process that ended or did not answer for `train.rank_timeout_minutes`.
    """
    records = {"data.json": to_mapping(cache.recipe), "splits.json": {"cache": cache.checksum, **cache.splits}}
    with StopRequest() as stop, join_ranks(device, config.train.rank_timeout_minutes) as (ranks, place):
        config = ranks.first(lambda: config)
        check_device(config, place)
        check_data(config, cache)
        check_ranks(config, cache, ranks)
        with RunFolder(run, config, records, resume=resume, ranks=ranks) as folder:
            return _run(Run(config, cache, folder, place, stop, ranks))


def _run(runner: Run) -> RunResult:
    with runner.log:
        try:
            with worker_errors(), rank_errors(runner.config.train.rank_timeout_minutes):
                return runner.train()
        except (TrainingError, DataError) as error:
            runner.log.say(str(error))
            raise


class Run:
    """One run: the network, its optimiser, and where they stand. Of several ranks the first alone writes files.

    Attributes:
        step: training steps taken.
        epoch: the epoch at work (0-based).
        batch: batches of it already taken.
        best: best validation Dice so far.
        saved_step: the step of the last checkpoint, None before the first.
        share: slices of a batch that this rank takes.
        reading_is_free: whether a value can be read without waiting for the device.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        run_folder: RunFolder,
        device: torch.device,
        stop: StopRequest,
        ranks: Ranks,
    ) -> None:
        folder = run_folder.path
        self.config, self.cache, self.folder, self.device = config, cache, folder, device
        self.run_folder = run_folder
        self.stop, self.ranks, self.share = stop, ranks, config.train.batch_size // ranks.size
        self.step = self.epoch = self.batch = 0
        self.best: float | None = None
        self.saved_step: int | None = None
        self.reading_is_free = device.type == "cpu"
        self.validation = "validation" if cache.splits.get("validation") else None
        self.pictures = RunPictures(folder, cache, self.validation, 0 if ranks.rank else config.train.overlays)

        rng.seed_all(config.train.seed)
        self.model: Any = SimMPNet(config.model, backend=config.train.backend)
        checkpoint = run_folder.take_checkpoint()
        if checkpoint is None:
            ranks.first(self._load_backbone)
        else:
            tensors, meta, state = checkpoint
            check_model_config(folder / WEIGHTS, meta.model, config.model)
            load_strict(self.model, tensors, str(folder / WEIGHTS))
        self.model.to(device).train()
        prepare_model(self.model, ranks)
        self.optimizer = make_optimizer(self.model, config.train)
        self.take_step = TrainStep(self.model, self.optimizer, config.train, device, ranks=ranks)
        if checkpoint is not None:
            self._restore(state)
        share_random_state(ranks)

        self.steps_per_epoch = len(self._loader(start_batch=0))
        run_folder.record()
        self.log: RunLog = SilentLog()
        ranks.first(lambda: self._open_log(None if checkpoint is None else state))
        self.saved_at = -math.inf if checkpoint is None else time.monotonic()  # the first step of a run is saved
        for line in (self._opening(resumed=checkpoint is not None), *run_folder.notes):
            self.log.say(line)

    def _load_backbone(self) -> None:
        source = self.config.train.backbone_weights
        if source is not None:
            self.model.backbone.load_weights(f"timm:{self.config.model.backbone}" if source == "timm" else source)

    def _restore(self, state: TrainingState) -> None:
        self.step, self.epoch, self.batch, self.best = state.step, state.epoch, state.batch, state.best
        self.saved_step = state.step
        self.optimizer.load_state_dict(state.optimizer)
        for group in self.optimizer.param_groups:
            group["capturable"] = self.config.train.cuda_graph  # the saved run may have been set otherwise
        self.take_step.loss_sum.fill_(state.loss_sum)
        rng.restore(state.rng)

    def _open_log(self, state: TrainingState | None) -> None:
        steps = self.config.train.epochs * self.steps_per_epoch
        length, checksum = (0, "") if state is None else (state.metrics_bytes, state.metrics_sha256)
        self.log = RunLog(self.folder, total_steps=steps, step=self.step, metrics_bytes=length, metrics_sha256=checksum)

    def _opening(self, *, resumed: bool) -> str:
        verb = "resumed" if resumed else "started"
        text = f"{verb} at step {self.step}, epoch {self.epoch}: {self.cache.name} on {self.device}"
        if self.ranks.size > 1:
            text += f", the first of {self.ranks.size} processes; their memory updates are made by portable operators"
        if self.validation is None:
            text += "; no validation cases, so no best checkpoint is chosen"
        return text

    def _loader(self, start_batch: int) -> Any:
        train = self.config.train
        return slice_loader(
            self.cache,
            "train",
            self.share,
            seed=train.seed,
            epoch=self.epoch,
            start_batch=start_batch,
            augment=train.augment,
            workers=train.workers,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
        )

    def _stopping(self) -> bool:
        """Whether some rank was asked to stop; all of them hear it at the same place."""
        return self.ranks.any(self.stop.requested)[0]

    def train(self) -> RunResult:
        """All epochs that are left."""
        while self.epoch < self.config.train.epochs and not self._stopping():
            self._train_epoch()
            if not self._stopping():
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
        wld = self._width_from_steps()
        self.model.train()
        clock, counted = time.monotonic(), self.step
        states = rng.capture()
        batches = iter(self._loader(self.batch))
        rng.restore(states)  # a loader may draw a seed as it starts, which a resumed run would draw once more
        for images, labels in self.stop.each(batches) if self.ranks.size == 1 else batches:
            with compile_errors(self.step) if train.compile else nullcontext():
                loss = self.take_step(images, labels, self.step, wld=wld)
            self.step += 1
            self.batch += 1
            self.log.advance()
            logged = self.step % train.log_every == 0
            if logged or self.reading_is_free:
                self._check_finite()
            if logged:
                rate = (self.step - counted) * train.batch_size / (time.monotonic() - clock)
                self.ranks.first(partial(self._log_step, loss, rate))
                clock, counted = time.monotonic(), self.step
            overdue = time.monotonic() - self.saved_at > 60 * train.checkpoint_minutes
            stopping, overdue = self.ranks.any(self.stop.requested, overdue)
            if stopping:
                return
            if overdue:
                self._save_last()

    def _width_from_steps(self) -> WidthChange:
        """What W-LD makes of the losses of this epoch's steps: in its first epoch it only remembers them."""
        train = self.config.train
        if train.wld_every != "step" or self.epoch < train.wld_from:
            return False
        return "remember" if self.epoch == train.wld_from else True

    def _log_step(self, loss: Tensor, images_per_second: float) -> None:
        self.run_folder.check_in_place()
        self.log.row(
            "train",
            self.step,
            self.epoch,
            loss=float(loss),
            lr=self.config.train.lr,
            k=int(self.model.wld.k),
            memory=self.model.memory_phase,
            images_per_second=round(images_per_second, 2),
        )
        self.log.note(loss=f"{float(loss):.4g}", images_per_second=f"{images_per_second:.1f}")

    def _finish_epoch(self) -> None:
        """Validate, log, save. Until validation is over nothing changes, so an interrupted one is simply repeated."""
        self._check_finite()
        train = self.config.train
        last = self.epoch + 1 == train.epochs
        due = self.epoch >= train.validate_from and (self.epoch - train.validate_from) % train.validate_every == 0
        dice = self._validate() if self.validation is not None and (due or last) else None
        if self._stopping():
            return
        mean_loss = self.take_step.loss_sum / self.batch
        if train.wld_every == "epoch" and self.epoch >= train.wld_from:
            self.model.wld.step(mean_loss)
        improved = dice is not None and not math.isnan(dice) and (self.best is None or dice > self.best)
        self.best = dice if improved else self.best
        self.ranks.first(lambda: self._log_epoch(float(mean_loss), dice))
        self.epoch, self.batch = self.epoch + 1, 0
        self.take_step.loss_sum.zero_()
        self.ranks.first(lambda: self._keep_weights(improved))
        self._save_last()
        if dice is not None:
            self.ranks.first(self._draw)

    def _log_epoch(self, mean_loss: float, dice: float | None) -> None:
        self.run_folder.check_in_place()
        self.log.row("epoch", self.step, self.epoch, mean_loss=mean_loss)
        text = f"epoch {self.epoch}: step {self.step}, mean loss {mean_loss:.4f}"
        if dice is not None:
            self.log.row("validation", self.step, self.epoch, dice=dice)
            text += f", validation Dice {dice:.4f}"
        self.log.say(text)

    def _keep_weights(self, improved: bool) -> None:
        every = self.config.train.keep_every
        if improved:
            save_weights(self.folder / "best.safetensors", self.model, self._metadata())
        if every and self.epoch % every == 0:
            save_weights(self.folder / f"epoch_{self.epoch:03d}.safetensors", self.model, self._metadata())

    def _draw(self) -> None:
        self.run_folder.check_in_place()
        self.pictures.draw(self.model, self.log.path, self.config.train.precision, title=f"epoch {self.epoch - 1}")

    def _validate(self) -> float | None:
        """Mean foreground Dice of the validation cases, shared by the ranks, NaN if none has foreground.

        None if a signal came. Training flags are restored.
        """
        dices = self.stop.unless_stopped(
            lambda: case_dice(
                self.model,
                self.cache,
                "validation",
                batch_size=self.share,
                precision=self.config.train.precision,
                rank=self.ranks.rank,
                ranks=self.ranks.size,
            )
        )
        everyones = self.ranks.everyone(dices)
        shares = [share for share in everyones if share is not None]
        if len(shares) < len(everyones):
            return None
        found = [dice for share in shares for dice in share]
        return float(np.mean(found)) if found else math.nan

    def _check_finite(self) -> None:
        bad = self.take_step.guard.read()
        if bad is None:
            return
        raise TrainingError(
            f"step {bad.step}, epoch {self.epoch}: {bad.describe()} at learning rate {self.config.train.lr:g}. "
            f"That step was not taken and nothing was written; {self.ranks.first(self._kept)}. "
            "Look at the data, or start a run with a lower train.lr or train.precision=float32"
        )

    def _kept(self) -> str:
        """Which checkpoints there are to go back to."""
        if self.saved_step is None:
            return "no checkpoint was written yet"
        kept = f"the last checkpoint is {self.folder / WEIGHTS} (step {self.saved_step})"
        before = previous_step(self.folder)
        if before is None or before >= self.saved_step:
            return kept
        return (
            f"{kept}, the one before it {self.folder / PREVIOUS} (step {before}): if the last already leads here, go "
            "back with --resume previous"
        )

    def _metadata(self) -> Metadata:
        recipe = self.run_folder.records["data.json"]
        return Metadata(self.config.model, tuple(self.cache.classes), self.step, self.epoch, recipe)

    def _save_last(self) -> None:
        self._check_finite()
        self.ranks.first(self._write_last)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def _write_last(self) -> None:
        self.run_folder.check_in_place()
        length, checksum = self.log.synced()
        state = TrainingState(
            step=self.step,
            epoch=self.epoch,
            batch=self.batch,
            loss_sum=float(self.take_step.loss_sum),
            best=self.best,
            metrics_bytes=length,
            metrics_sha256=checksum,
            optimizer=self.optimizer.state_dict(),
            rng=rng.capture(),
            config=to_mapping(self.config),
            records=self.run_folder.records,
            environment=self.run_folder.environment,
        )
        save_last(self.folder, self.model, self._metadata(), state)
