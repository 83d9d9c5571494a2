"""What the commands write: caches, results of evaluations, predictions. All through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from fault_harness import REPLACES, Lost, Scenario, own_words
from matplotlib.backends.backend_agg import FigureCanvasAgg
from small_sets import write_picture, write_volume, write_yaml
from stand_ins import LevelModel

from simmp_fast.cli import evaluate as evaluate_command
from simmp_fast.cli import main
from simmp_fast.cli import predict as predict_command
from simmp_fast.config import ModelConfig, to_mapping
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.training.checkpoint import Metadata, save_weights

CLASSES = ("background", "low", "high")
SIDE = 32


def make_set(folder: Path, seed: int) -> Path:
    """The YAML file of four grey pictures with masks."""
    rng = np.random.default_rng(seed)
    for i in range(4):
        mask = rng.integers(0, 3, (9, 8)).astype(np.uint8)
        write_picture(folder / "images" / f"{i}.png", (mask * 100 + rng.integers(0, 50, (9, 8))).astype(np.uint8))
        write_picture(folder / "masks" / f"{i}.png", mask)
    return write_yaml(folder / "set.yaml", name="set", classes=list(CLASSES), split={"test": 0.5})


def prepare(description: Path, out: Path, *more: str) -> int:
    return main(["prepare", str(description), "--out", str(out), "--image-size", str(SIDE), *more])


class PrepareNew(Scenario):
    """A cache where there is no folder yet."""

    name = "prepare, new folder"

    def set_up(self) -> None:
        make_set(self.assets / "set", 0)

    def operate(self, place: Path) -> int:
        return prepare(self.assets / "set" / "set.yaml", place / "cache")

    def again(self, place: Path) -> int:
        status = self.operate(place)
        return 0 if status == 2 and "already holds a prepared cache" in own_words() else status

    def state(self, place: Path) -> str:
        """By what a reader finds; a folder without a cache is as good as none where there was none."""
        wanted = {Cache.open(self.reference / "cache").checksum: "new"}
        before = self.reference.with_name("template") / "cache"
        if self.old.get("cache/manifest.json"):
            wanted[Cache.open(before).checksum] = "old"
        try:
            found = Cache.open(place / "cache", verify=True).checksum
        except DataError as error:
            if "old" in wanted.values():
                raise Lost(f"no cache any more: {error}") from None
            return "old"
        if found not in wanted:
            raise Lost("another cache than the old and the new one")
        return wanted[found]


class PrepareEmpty(PrepareNew):
    """A cache in an empty folder, which stays itself."""

    name = "prepare, empty folder"

    def fill(self, place: Path) -> None:
        (place / "cache").mkdir()


class PrepareOver(PrepareNew):
    """A cache over another one."""

    name = "prepare --force"
    short = REPLACES

    def set_up(self) -> None:
        super().set_up()
        make_set(self.assets / "before", 1)

    def fill(self, place: Path) -> None:
        assert prepare(self.assets / "before" / "set.yaml", place / "cache") == 0

    def operate(self, place: Path) -> int:
        return prepare(self.assets / "set" / "set.yaml", place / "cache", "--force")

    again = operate


def draw_quickly(stamp: str) -> None:
    """Let every picture be a few bytes: drawing takes longer than all the rest, and what it shows is not the matter."""
    content = f"a picture of {stamp}".encode()
    FigureCanvasAgg.print_png = lambda self, target: target.write(content)  # type: ignore[method-assign]


def make_run(folder: Path, cache: Cache, levels: float) -> None:
    """A run folder as evaluate and predict need it; `levels` is what its network differs by."""
    folder.mkdir()
    model = LevelModel()
    model.levels.data *= levels
    (folder / "data.json").write_text(json.dumps(to_mapping(cache.recipe)))
    save_weights(folder / "best.safetensors", model, Metadata(ModelConfig(classes=3), CLASSES, 1, 1))


def load_network(source: Path, backend: str) -> tuple[Any, Path]:
    """Stands for the loading of a real network."""
    model = LevelModel()
    if source.name == "before":
        model.levels.data *= 0.7
    return model.eval(), source / "best.safetensors"


class WithNetwork(Scenario):
    """Two trained networks, `before` and `after`, on one cache."""

    def set_up(self) -> None:
        make_set(self.assets / "set", 0)
        assert prepare(self.assets / "set" / "set.yaml", self.assets / "cache") == 0
        cache = Cache.open(self.assets / "cache")
        make_run(self.assets / "before", cache, 0.7)
        make_run(self.assets / "after", cache, 1.0)

    def operate(self, place: Path) -> int:
        return self.command("after", place)

    def command(self, run: str, place: Path) -> int:
        raise NotImplementedError


class Evaluate(WithNetwork):
    """Results over those of other weights."""

    name = "evaluate"
    short = REPLACES
    users = (".", "out")
    mixed = True

    def fill(self, place: Path) -> None:
        assert self.command("before", place) == 0

    def command(self, run: str, place: Path, *more: str) -> int:
        evaluate_command.load_network = load_network
        words = ["evaluate", self.assets / run, "--data", self.assets / "cache", "--protocol", "strict", *more]
        return main([str(word) for word in (*words, "--device", "cpu", "--out", place / "out")])

    def again(self, place: Path) -> int:
        """A table without the summary that belongs to it is refused, and replaced when that is asked for."""
        parted = self.state(place) == "mixed"
        status = self.operate(place)
        return self.command("after", place, "--overwrite") if parted and status == 2 else status


class EvaluateNew(Evaluate):
    """The first results in a folder."""

    name = "evaluate, new folder"
    short = ("kill",)
    users = (".",)

    def fill(self, place: Path) -> None:
        pass


class Predict(WithNetwork):
    """Label maps, probabilities and overlays over older ones."""

    name = "predict --overwrite"
    short = REPLACES
    users = (".", "out")
    mixed = True

    def set_up(self) -> None:
        super().set_up()
        rng = np.random.default_rng(3)
        (self.assets / "images").mkdir()
        write_volume(self.assets / "images" / "a.nii.gz", rng.integers(0, 256, (9, 8, 1)).astype(np.uint8))

    def fill(self, place: Path) -> None:
        assert self.command("before", place) == 0

    def command(self, run: str, place: Path) -> int:
        predict_command.load_network = load_network
        draw_quickly(run)
        words = ["predict", self.assets / run, self.assets / "images", "--out", place / "out", "--overwrite"]
        return main([str(word) for word in (*words, "--device", "cpu", "--probabilities", "--overlays")])

    def state(self, place: Path) -> str:
        """As for all, and a new label map says that its companions are new."""
        state = super().state(place)
        found = self.snapshot(place)
        if state == "mixed" and found.get("out/a.nii.gz") == self.new["out/a.nii.gz"]:
            raise Lost(f"a new label map beside older companions: {self.parted(found)}")
        return state


class PredictNew(Predict):
    """Predictions into a new folder."""

    name = "predict, new folder"
    short = ("kill",)
    users = (".",)

    def fill(self, place: Path) -> None:
        pass
