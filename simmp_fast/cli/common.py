"""What the commands share: the look of their help, common options, and how a trained network is found."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmp_fast.bounds import TRAIN_LIMITS
from simmp_fast.config import BACKENDS, PRECISIONS, ConfigError
from simmp_fast.messages import Note, one_line, shown

if TYPE_CHECKING:
    import torch

    from simmp_fast.data.preprocess import Recipe
    from simmp_fast.model import SimMPNet


RECIPE = "data.json"


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every option, examples left as they are written."""


def add_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A command's parser; `example` is shown under its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example:\n  {example}", formatter_class=_Help
    )
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where the network comes from and how it runs."""
    parser.add_argument(
        "model",
        type=Path,
        help="a run folder (its best checkpoint, else its last), a checkpoint file, or a folder that convert wrote",
    )
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)", default=None)
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="operator backend")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16 runs under autocast")
    parser.add_argument("--batch-size", type=_batch_size, default=8, help="slices per forward pass")
    parser.add_argument("--mirror", action="store_true", help="average over mirror images")


def _batch_size(text: str) -> int:
    most = TRAIN_LIMITS["batch_size"][0]
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a whole number from 1 to {most}")
    return number


def choose_device(name: str | None) -> torch.device:
    """The device `name`, or a GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices have shapes alone, and no values
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU, named cpu")
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ConfigError(
            f"--device: got {shown(name)}, which cannot be used here, expected one such as cpu or cuda:0: "
            f"{one_line(reason)}"
        ) from None
    return device


def find_weights(source: Path) -> Path:
    """The checkpoint file that `source` stands for.

    Raises:
        ConfigError: nothing there to load.
    """
    if source.is_file():
        return source
    for name in ("best.safetensors", "last.safetensors", "model.safetensors"):
        if (source / name).is_file():
            return source / name
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder, expected a run folder or a checkpoint")
    raise ConfigError(
        f"{source}: holds none of best.safetensors, last.safetensors and model.safetensors, expected a run folder, or "
        "a folder that convert wrote"
    )


def load_network(source: Path, backend: str) -> tuple[SimMPNet, Path]:
    """The network that `source` stands for, in evaluation mode, and the file it came from."""
    from simmp_fast.model import SimMPNet
    from simmp_fast.training import load_model

    weights = find_weights(source)
    if weights.name == "model.safetensors":
        return SimMPNet.from_pretrained(weights.parent, backend=backend), weights
    return load_model(weights, backend)[0], weights


def load_recipe(weights: Path, given: Path | None) -> Recipe:
    """How files become input for a network, as `known_recipe` finds it.

    Raises:
        ConfigError: it is nowhere, it cannot be used, or ``data.json`` is not that of the weights.
        DataError: the weights cannot be read.
    """
    recipe = known_recipe(weights, given)
    if recipe is None:
        raise ConfigError(
            f"{weights.parent / RECIPE}: no such file; name with --recipe the data.json of a run on the same kind of "
            "data: it says how intensities are scaled, how volumes are sliced, and what the classes are called"
        )
    return recipe


def known_recipe(weights: Path, given: Path | None = None) -> Recipe | None:
    """How files become input for a network: the recipe given, or ``data.json`` beside its weights, or that in them.

    A given one that differs from that in the weights is the user's choice, and worth a `Note`.

    Returns:
        None where none of the three is there.

    Raises:
        ConfigError: it cannot be used, or ``data.json`` is not that of the weights.
        DataError: the weights cannot be read.
    """
    from simmp_fast.config import from_mapping, read_json, to_mapping
    from simmp_fast.data.preprocess import Recipe
    from simmp_fast.differences import differences, listed

    content = _in_header(weights, "recipe")
    saved = None if content is None else from_mapping(Recipe, content, f"{weights}: recipe")
    path = given if given is not None else weights.parent / RECIPE
    if given is None and not path.exists():
        return saved
    recipe = from_mapping(Recipe, read_json(path), str(path))
    changed = {} if saved is None else differences(to_mapping(saved), to_mapping(recipe))
    if changed and given is None:
        raise ConfigError(
            f"{path}: differs from what {weights.name} was trained on: {listed(changed)}; restore it, or remove it: "
            "the weights hold it too"
        )
    if changed:
        warnings.warn(Note(f"{path}: differs from what {weights} was trained on: {listed(changed)}"), stacklevel=2)
    return recipe


def class_names(weights: Path) -> list[str] | None:
    """The class names that a run's checkpoint holds; None for weights that name none.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    names = _in_header(weights, "classes")
    return None if names is None else [str(name) for name in names]


def _in_header(weights: Path, key: str) -> Any:
    """What the header of a weights file, once verified, holds as JSON under `key`; None if it does not."""
    from simmp_fast.data.errors import DataError
    from simmp_fast.model.sealing import in_header, read_sealed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # `load_network` says it
        _, header = read_sealed(weights, DataError)
    return in_header(weights, header, key, DataError)
