"""Configuration: frozen dataclasses, presets by name, YAML files and overrides, in that order of precedence.

Every problem is a `ConfigError` that names the key, what it got and what it needs.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from simmp_fast.bounds import (
    MAX_DEPTH,
    MODEL_LIMITS,
    TRAIN_LIMITS,
    require,
    require_finite,
    require_heads,
    require_limits,
    require_memory,
)
from simmp_fast.documents import MAX_JSON, MAX_YAML, ConfigError, parse_json, parse_yaml
from simmp_fast.messages import one_line, shown, why_no_file

T = TypeVar("T")

BACKENDS = ("auto", "reference", "portable", "triton")
PRECISIONS = ("float32", "bfloat16")
SEEDS = 2**64  # what PyTorch's generators take
_OVERRIDE_DEPTH = 8  # parts of a key: more than any configuration has


def fitting_windows(height: int, width: int) -> list[int]:
    """Window sizes (2 to 8) that divide a `height` x `width` grid into at least two windows (model, section 5)."""
    return [w for w in range(2, 9) if height % w == 0 and width % w == 0 and (height // w) * (width // w) >= 2]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's shape and behaviour. Symbols in brackets are those of the paper.

    Attributes:
        classes: number of classes, background included.
        in_channels: input channels; other than 3, a 1x1 convolution with batch norm brings them to 3.
        image_size: side in pixels of the square image that encoder A and the heads work on [S1].
        dmwla_size: side in pixels of the square image that encoder B works on [S2], a multiple of 32.
        backbone: name of a timm MaxViT or CoAtNet model.
        depths: DMW-LA blocks in the four stages of encoder B; DS-GIM follows each block of the third.
        clusters: clusters of the memory bank in encoder B [K].
        feature_dim: feature dimension in encoder B [D].
        decoder_clusters: clusters of the memory bank in the decoder.
        decoder_feature_dim: feature dimension in the decoder.
        slots: memory slots per cluster [M].
        window: side of the DS-GIM windows in tokens; None chooses the largest that fits the grid.
        warmup_steps: training steps that fill the bank before it is structured [T_w].
        update_rate: weight of the token in a memory write.
        key_momentum: share of the old weights in the momentum key's update.
        memory_seed: seed of the generator that draws the warm-up writes and fills small clusters.
        variant: "paper", or "released" for what the authors' released code computes (docs/errata.md).
    """

    classes: int = 9
    in_channels: int = 1
    image_size: int = 256
    dmwla_size: int = 224
    backbone: str = "maxxvit_rmlp_small_rw_256"
    depths: tuple[int, ...] = (2, 2, 6, 2)
    clusters: int = 9
    feature_dim: int = 256
    decoder_clusters: int = 10
    decoder_feature_dim: int = 128
    slots: int = 100
    window: int | None = None
    warmup_steps: int = 2000
    update_rate: float = 0.3
    key_momentum: float = 0.95
    memory_seed: int = 2222
    variant: str = "paper"

    def __post_init__(self) -> None:
        require_finite("model", self)
        for key in ("classes", "image_size", "dmwla_size", "in_channels", "clusters", "feature_dim"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        for key in ("decoder_clusters", "decoder_feature_dim", "slots", "warmup_steps"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        require(self.classes >= 2, "model.classes", self.classes, "at least 2 (background and one more)")
        require(self.image_size % 32 == 0, "model.image_size", self.image_size, "a multiple of 32")
        require(self.dmwla_size % 32 == 0, "model.dmwla_size", self.dmwla_size, "a multiple of 32")
        require(len(self.depths) == 4 and min(self.depths) >= 1, "model.depths", self.depths, "four numbers >= 1")
        require(max(self.depths) <= MAX_DEPTH, "model.depths", self.depths, f"at most {MAX_DEPTH} in a stage")
        require_limits("model", self, MODEL_LIMITS)
        require(0 < self.update_rate <= 1, "model.update_rate", self.update_rate, "a number in (0, 1]")
        require(0 <= self.key_momentum <= 1, "model.key_momentum", self.key_momentum, "a number in [0, 1]")
        require(abs(self.memory_seed) < SEEDS, "model.memory_seed", self.memory_seed, "a number below 2^64")
        require(self.variant in ("paper", "released"), "model.variant", self.variant, "'paper' or 'released'")
        self.resolved_window()
        encoder = sum(self.depths) * self.clusters * self.feature_dim
        decoder = 4 * self.decoder_clusters * self.decoder_feature_dim
        banks = "model.depths x clusters x slots x feature_dim, and the decoder's four: memory banks"
        require_memory(banks, 4 * self.slots * (encoder + decoder))

    def resolved_window(self) -> int:
        """The DS-GIM window in tokens: as set, or the largest that fits the third stage's grid."""
        grid = self.dmwla_size // 16
        fits = fitting_windows(grid, grid)
        if not fits:
            raise ConfigError(
                f"model.dmwla_size: got {self.dmwla_size}, whose third-stage grid of {grid}x{grid} tokens no window "
                "of 2 to 8 divides into at least two; expected a multiple of 32 from 64 on"
            )
        if self.window is None:
            return max(fits)
        listed = ", ".join(map(str, fits))
        require(self.window in fits, "model.window", self.window, f"one of {listed} for a grid of {grid}x{grid}")
        return self.window


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe (model definition, sections 4, 7 and 8).

    Attributes:
        epochs: passes over the training slices.
        batch_size: slices per step, shared by all processes that train together.
        lr: AdamW learning rate, constant.
        weight_decay: AdamW weight decay.
        seed: seed of weights, order and augmentation.
        augment: quarter turns, flips and small rotations.
        ce_weight: weight of cross-entropy in the loss.
        dice_weight: weight of Dice in the loss.
        validate_from: first epoch (0-based) after which validation runs; the last epoch always validates.
        validate_every: epochs between validations from then on.
        keep_every: every n-th epoch's weights are kept beside `last` and `best`; 0 keeps none.
        wld_from: epoch (0-based) whose losses W-LD remembers first; it sets the update width from the next epoch on.
        wld_every: "step", or "epoch" for once an epoch on the mean loss.
        precision: "float32" or "bfloat16" (autocast).
        channels_last: keep feature maps and convolution weights with the channels innermost.
        compile: put the forward pass and the loss under `torch.compile`; the first steps take much longer.
        cuda_graph: replay the step from a CUDA graph, captured after three steps of each phase of the memory.
        backend: operator backend: "auto", "reference", "portable" or "triton".
        backbone_weights: path of a local checkpoint, "timm" to download pretrained weights, or None.
        workers: processes that load data; 0 loads in the training process.
        log_every: steps between two lines of metrics; on a GPU also between two looks at the loss.
        checkpoint_minutes: minutes between two checkpoints inside a long epoch.
        overlays: validation slices drawn into the run folder.
        rank_timeout_minutes: how long several processes wait for one another before they give up.
    """

    epochs: int = 300
    batch_size: int = 20
    lr: float = 1e-4
    weight_decay: float = 1e-4
    seed: int = 2222
    augment: bool = True
    ce_weight: float = 0.3
    dice_weight: float = 0.7
    validate_from: int = 100
    validate_every: int = 1
    keep_every: int = 50
    wld_from: int = 100
    wld_every: str = "step"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    backend: str = "auto"
    backbone_weights: str | None = None
    workers: int = 0
    log_every: int = 10
    checkpoint_minutes: float = 10.0
    overlays: int = 4
    rank_timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        require_finite("train", self)
        for key in ("epochs", "batch_size", "validate_every", "log_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        for key in ("validate_from", "keep_every", "wld_from", "workers", "overlays", "weight_decay", "seed"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        require(self.seed < SEEDS, "train.seed", self.seed, "a number below 2^64")
        require_limits("train", self, TRAIN_LIMITS)
        for key in ("ce_weight", "dice_weight"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        total = self.ce_weight + self.dice_weight
        require(total > 0, "train.ce_weight + train.dice_weight", total, "a number above 0")
        require(self.lr > 0, "train.lr", self.lr, "a number above 0")
        for key in ("checkpoint_minutes", "rank_timeout_minutes"):
            require(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "a number above 0")
        require(self.wld_every in ("step", "epoch"), "train.wld_every", self.wld_every, "'step' or 'epoch'")
        require(self.precision in PRECISIONS, "train.precision", self.precision, "float32 or bfloat16")
        require(self.backend in BACKENDS, "train.backend", self.backend, "one of " + ", ".join(BACKENDS))


@dataclass(frozen=True)
class Config:
    """One run: the network and its training. The data comes as a prepared cache, named on the command line."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require_heads(self.model.dmwla_size, self.model.image_size)
        pixels = self.train.batch_size * self.model.in_channels * self.model.image_size**2
        require_memory("train.batch_size x model.in_channels x model.image_size^2: images of a batch", 4 * pixels)


PRESETS: dict[str, Config] = {
    "synapse": Config(ModelConfig(classes=9, clusters=9, feature_dim=256)),
    "acdc": Config(ModelConfig(classes=4, clusters=4, feature_dim=128)),
    "segpc2021": Config(ModelConfig(classes=3, in_channels=3, clusters=3, feature_dim=256)),
    "isic2018": Config(ModelConfig(classes=2, in_channels=3, clusters=2, feature_dim=256)),
    "small": Config(
        ModelConfig(
            classes=4,
            image_size=128,
            dmwla_size=224,
            backbone="maxvit_rmlp_pico_rw_256",
            depths=(1, 1, 2, 1),
            clusters=4,
            feature_dim=32,
            decoder_clusters=4,
            decoder_feature_dim=32,
            slots=20,
            warmup_steps=40,
        ),
        TrainConfig(epochs=22, batch_size=8, lr=1e-3, validate_from=1, validate_every=2, wld_from=4, keep_every=0),
    ),
}


def preset(name: str) -> Config:
    """The preset `name`; raises `ConfigError` that lists the presets there are."""
    require(name in PRESETS, "preset", name, "one of " + ", ".join(sorted(PRESETS)))
    return PRESETS[name]


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as the annotated type `kind`, or a `ConfigError` that names `key`."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        inner = [o for o in options if o is not type(None)]
        return _coerce(key, value, inner[0])
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast("type[Any]", kind), value, key)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), key, value, "a list")
        if len(options) == 2 and options[1] is Ellipsis:
            return tuple(_coerce(f"{key}[{i}]", v, options[0]) for i, v in enumerate(value))
        require(len(value) == len(options), key, value, f"a list of {len(options)}")
        return tuple(_coerce(f"{key}[{i}]", v, o) for i, (v, o) in enumerate(zip(value, options, strict=True)))
    if origin is dict:
        require(isinstance(value, Mapping), key, value, "a mapping")
        return {
            _coerce(f"{key} key", k, options[0]): _coerce(f"{key}.{one_line(str(k), 60)}", v, options[1])
            for k, v in value.items()
        }
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as a string
        except OverflowError:
            number = math.inf
        except ValueError:
            number = None
        if number is not None:
            require(math.isfinite(number), key, value, "a finite number")
            return number
    name = getattr(kind, "__name__", str(kind))
    require(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
        key,
        value,
        f"{'an' if name[0] in 'aeiou' else 'a'} {name}",
    )
    require(kind is not int or abs(value) < 2**64, key, value, "a whole number of at most 64 bits")
    return value


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from a mapping, checking keys and types.

    Args:
        cls: a dataclass type; nested dataclasses are built from nested mappings.
        mapping: keys are field names.
        where: prefix of the keys in messages.

    Raises:
        ConfigError: an unknown key, a missing key, a wrong type, or a value the dataclass refuses.
    """
    require(isinstance(mapping, Mapping), where or "configuration", mapping, "a mapping of keys to values")
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in mapping:
        if key not in fields:
            unknown = "unknown key" if isinstance(key, str) else f"got a key of type {type(key).__name__}"
            raise ConfigError(f"{prefix}{one_line(str(key), 60)}: {unknown}, expected one of {', '.join(fields)}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            raise ConfigError(f"{prefix}{name}: missing, expected a value")
    return cls(**{k: _coerce(f"{prefix}{k}", v, hints[k]) for k, v in mapping.items()})


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts and lists, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return typing.cast("dict[str, Any]", plain(dataclasses.asdict(config)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, too large, not YAML, holds a key twice, or holds no mapping.
    """
    return _read(Path(path), "YAML", parse_yaml, 4 * MAX_YAML)  # UTF-8 has up to four bytes a character


def read_json(path: str | Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ConfigError: the file is missing, too large, not JSON, holds a key twice, or holds no mapping.
    """
    return _read(Path(path), "JSON", parse_json, MAX_JSON)


def _read(path: Path, kind: str, parse: Callable[[str], Any], most: int) -> dict[str, Any]:
    if why := why_no_file(path):
        raise ConfigError(f"{path}: {why}")
    try:
        if (size := path.stat().st_size) > most:
            raise ConfigError(f"got {size} bytes, expected at most {most}")
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: cannot be read as {kind}: {error}") from None
    if content is None:
        raise ConfigError(f"{path}: got nothing, expected a mapping of keys to values")
    require(isinstance(content, dict), str(path), content, "a mapping of keys to values")
    return typing.cast("dict[str, Any]", content)


def merge(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over `base`, later ones winning.

    Raises:
        ConfigError: a single value in the place of a mapping.
    """
    result = dict(base)
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            if isinstance(old, Mapping):
                require(isinstance(value, Mapping), str(key), value, "a mapping of keys to values")
                value = merge(old, value)
            result[key] = value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """``"train.lr=1e-3"`` as ``{"train": {"lr": 0.001}}``; the value is read as YAML.

    Raises:
        ConfigError: no key, no ``=``, or a value that is not YAML.
    """
    key, separator, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    whole = bool(separator) and all(parts) and len(parts) <= _OVERRIDE_DEPTH
    require(whole, "--set", text, "section.key=value, such as train.lr=1e-3")
    try:
        nested = parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"--set: got {shown(text)}, whose value cannot be read as YAML: {error}") from None
    for part in reversed(parts):
        nested = {part: nested}
    return typing.cast("dict[str, Any]", nested)


def resolve(preset_name: str, yaml_path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """The configuration of a run: preset, then YAML file, then ``section.key=value`` overrides.

    Raises:
        ConfigError: an unknown preset or key, a wrong type, or values that do not fit together.
    """
    layers: list[Mapping[str, Any]] = [read_yaml(yaml_path)] if yaml_path is not None else []
    layers += [parse_override(text) for text in overrides]
    return from_mapping(Config, merge(to_mapping(preset(preset_name)), *layers))
