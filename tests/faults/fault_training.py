"""What training writes: checkpoints, best weights, whole runs; and networks in folders of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from fault_calls import ACTIONS
from fault_harness import REPLACES, Lost, Scenario
from fault_results import draw_quickly
from safetensors import safe_open
from torch import nn
from training_stubs import CLASSES, TinyModel, assert_equal_runs, make_cache, tiny_config

from simmp_fast.cli import main
from simmp_fast.config import ConfigError, ModelConfig, to_mapping
from simmp_fast.files import remove_leftovers
from simmp_fast.model import SimMPNet
from simmp_fast.model.pretrained import read
from simmp_fast.training import loop, rng
from simmp_fast.training.checkpoint import (
    Metadata,
    TrainingState,
    load_last,
    read_weights,
    save_last,
    save_weights,
)

# A library leaves SIGTERM to its program.
OF_LIBRARY = tuple(name for name in ACTIONS if name != "term")


def make_model(step: int) -> tuple[TinyModel, Metadata]:
    """A network that is a function of `step`."""
    torch.manual_seed(step)
    return TinyModel(tiny_config().model), Metadata(tiny_config().model, CLASSES, step, 0)


def make_state(step: int, model: nn.Module) -> TrainingState:
    """A training state that is a function of `step`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(step))
    optimizer.step()
    return TrainingState(
        step=step,
        epoch=0,
        batch=step,
        loss_sum=0.5 * step,
        best=None,
        metrics_bytes=0,
        metrics_sha256="",
        optimizer=optimizer.state_dict(),
        rng=rng.capture(),
        config={},
        records={},
        environment={},
    )


def save(folder: Path, step: int) -> None:
    model, meta = make_model(step)
    state = make_state(step, model)
    save_last(folder, model, meta, state)


def check_weights(tensors: dict[str, torch.Tensor], expected: nn.Module, what: str) -> None:
    """Raise `Lost` unless they are equal bit for bit."""
    wanted = expected.state_dict()
    if tensors.keys() != wanted.keys() or not all(torch.equal(tensors[name], wanted[name]) for name in wanted):
        raise Lost(f"{what}: other weights than were saved")


class Checkpoint(Scenario):
    """`save_last` over an older checkpoint."""

    name = "checkpoint"
    short = (*REPLACES, "eio", "int")
    users = ("run",)
    meanwhile = ("last.pending.safetensors", "previous.pending.safetensors")
    actions = OF_LIBRARY

    def fill(self, place: Path) -> None:
        (place / "run").mkdir()
        save(place / "run", 1)

    def operate(self, place: Path) -> None:
        save(place / "run", 2)

    def again(self, place: Path) -> None:
        remove_leftovers(place / "run")  # as a resumed run does
        save(place / "run", 3)

    def state(self, place: Path) -> str:
        """By what `last.safetensors` alone is, and then by what a resumed run would take."""
        folder, known = place / "run", {1: "old", 2: "new", 3: "third"}
        if (folder / "last.safetensors").exists():
            tensors, meta = read_weights(folder / "last.safetensors")
            check_weights(tensors, self.trained(meta.step), "last.safetensors alone")
        elif "run/last.safetensors" in self.old:
            raise Lost("no last.safetensors any more")
        loaded = load_last(folder)
        if loaded is None:
            if "run/last.safetensors" in self.old:
                raise Lost("no checkpoint any more")
            return "old"
        tensors, meta, state = loaded
        model = self.trained(meta.step)
        check_weights(tensors, model, "the checkpoint")
        wanted = make_state(meta.step, make_model(meta.step)[0])
        if (state.step, state.loss_sum, state.batch) != (meta.step, 0.5 * meta.step, meta.step):
            raise Lost(f"weights of step {meta.step} with the state of step {state.step}")
        for index, values in wanted.optimizer["state"].items():
            if not torch.equal(values["momentum_buffer"], state.optimizer["state"][index]["momentum_buffer"]):
                raise Lost("another optimiser's state than was saved")
        return known[meta.step]

    def trained(self, step: int) -> nn.Module:
        model, _ = make_model(step)
        make_state(step, model)
        return model

    def finished(self, place: Path) -> None:
        """The third checkpoint is there."""
        if (state := self.state(place)) != "third":
            raise Lost(f"a later checkpoint was saved, and {state} is found")


class FirstCheckpoint(Checkpoint):
    """`save_last` where there is no checkpoint yet."""

    name = "checkpoint, the first"
    short = ("kill",)

    def fill(self, place: Path) -> None:
        (place / "run").mkdir()


class Best(Scenario):
    """`save_weights` over older weights."""

    name = "best weights"
    short = REPLACES
    users = ("run",)
    actions = OF_LIBRARY

    def fill(self, place: Path) -> None:
        (place / "run").mkdir()
        save_weights(place / "run" / "best.safetensors", *make_model(1))

    def operate(self, place: Path) -> None:
        remove_leftovers(place / "run")
        save_weights(place / "run" / "best.safetensors", *make_model(2))

    def state(self, place: Path) -> str:
        tensors, meta = read_weights(place / "run" / "best.safetensors")
        check_weights(tensors, make_model(meta.step)[0], "best.safetensors")
        return {1: "old", 2: "new"}[meta.step]


class SmallNetwork(SimMPNet):
    """Saved as the real one, with a layer for a network."""

    def __init__(self, config: Any = None, scale: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.config = config or ModelConfig(classes=3)
        self.layer = nn.Linear(7, 5)
        nn.init.constant_(self.layer.weight, scale)
        nn.init.constant_(self.layer.bias, scale)


class SavePretrained(Scenario):
    """`save_pretrained` over another network."""

    name = "save_pretrained"
    short = REPLACES
    users = ("network",)
    mixed = rolls_back = True
    actions = OF_LIBRARY

    def fill(self, place: Path) -> None:
        SmallNetwork(ModelConfig(classes=5), 5.0).save_pretrained(place / "network")

    def operate(self, place: Path) -> None:
        SmallNetwork().save_pretrained(place / "network")

    def again(self, place: Path) -> None:
        remove_leftovers(place / "network")
        self.operate(place)

    def checksum(self, path: Path) -> str:
        """Of what safetensors hold: the header's keys come in any order."""
        if path.suffix != ".safetensors":
            return super().checksum(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}
            return repr((sorted((file.metadata() or {}).items()), tensors))

    def state(self, place: Path) -> str:
        """As for all; configuration and weights of two networks must be refused."""
        state = super().state(place)
        if state == "mixed" and self.readable(place / "network"):
            raise Lost(f"a network of old and new files is read: {self.parted(self.snapshot(place))}")
        return state

    def readable(self, folder: Path) -> bool:
        try:
            read(folder, {})
        except ConfigError:
            return False
        return True


class SavePretrainedNew(SavePretrained):
    """`save_pretrained` where there is no folder yet."""

    name = "save_pretrained, new folder"
    short = ("kill",)
    users = (".",)

    def fill(self, place: Path) -> None:
        pass


class Convert(SavePretrainedNew):
    """The command `convert`."""

    name = "convert"
    short = ("kill",)
    actions = tuple(ACTIONS)

    def operate(self, place: Path) -> int:
        SimMPNet.from_released = classmethod(lambda *_, **__: SmallNetwork())  # type: ignore[method-assign,assignment]
        SmallNetwork.memory_phase = "structured"  # type: ignore[assignment,misc]
        return main(["convert", str(self.assets / "released.pth"), "--out", str(place / "network")])

    def again(self, place: Path) -> int:
        """What is there whole is refused; another name is taken then."""
        status = self.operate(place)
        return 0 if status == 2 and self.readable(place / "network") else status


class Training(Scenario):
    """A whole run of two epochs, resumed afterwards."""

    name = "training run"
    ignored = ("run/tensorboard",)
    meanwhile = ("last.pending.safetensors", "previous.pending.safetensors", "last.safetensors", "last.state.pt")
    short = ("kill", "full")
    stride = 23

    def set_up(self) -> None:
        make_cache(self.assets / "cache", train=4, validation=2)
        config = tiny_config(epochs=2, checkpoint_minutes=1e-9, keep_every=1)
        (self.assets / "run.yaml").write_text(yaml.safe_dump(to_mapping(config)))

    def operate(self, place: Path) -> int:
        draw_quickly("a run")
        loop.SimMPNet = TinyModel  # type: ignore[assignment,misc]
        words = ["train", "--data", self.assets / "cache", "--run", place / "run", "--config", self.assets / "run.yaml"]
        if (place / "run" / "config.yaml").exists():
            words.append("--resume")
        return main([str(word) for word in (*words, "--device", "cpu")])

    def state(self, place: Path) -> str:
        if (place / "run" / "metrics.jsonl").exists() and self.new and self.ended(place):
            return "new"
        return "resumed" if (place / "run" / "config.yaml").exists() else "old"

    def ended(self, place: Path) -> bool:
        loaded = load_last(place / "run")
        return loaded is not None and loaded[1].epoch == 2

    def finished(self, place: Path) -> None:
        """The run is bit for bit the one that nothing disturbed."""
        try:
            assert_equal_runs(place / "run", self.reference / "run")
            for name in ("best.safetensors", "epoch_001.safetensors", "epoch_002.safetensors"):
                one, other = (read_weights(folder / "run" / name)[0] for folder in (place, self.reference))
                assert one.keys() == other.keys(), name
                assert all(torch.equal(one[key], other[key]) for key in one), name
        except AssertionError as error:
            raise Lost(f"the resumed run differs: {error}") from error
