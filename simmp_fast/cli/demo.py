"""``simmp-fast demo``: the whole way once, on a real MRI head, in minutes on two cores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmp_fast.cli.common import add_command, choose_device, load_network, load_recipe
from simmp_fast.config import BACKENDS, ConfigError

if TYPE_CHECKING:
    from simmp_fast.config import Config
    from simmp_fast.data import Cache

IMAGE_SIZE = 128


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        "prepare, train, evaluate and predict on the MRI template that comes with nilearn",
        """simmp-fast demo --out demo
  simmp-fast prepare demo --image-size 128 --out demo-cache
  simmp-fast demo --cache demo-cache      # on another machine, without nilearn and nibabel""",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="start from this cache, which prepare demo wrote; a slice of it is predicted in place of a volume "
        "(default: prepare one in the folder of --out)",
    )
    parser.add_argument("--device", default=None, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="operator backend")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as train.epochs=2")
    parser.set_defaults(run=run)


def _prepared(folder: Path) -> Cache:
    """The demo's cache, made anew unless a whole one is there."""
    from simmp_fast.data import Cache, DataError, open_source, prepare

    if folder.exists():
        try:
            return Cache.open(folder, verify=True)
        except DataError as error:
            print(f"      {error}; preparing it again")
    return prepare(open_source("demo"), folder, IMAGE_SIZE, force=True)


def _given(folder: Path) -> Cache:
    """The cache that `--cache` names, checked."""
    from simmp_fast.data import Cache

    cache = Cache.open(folder, verify=True)
    if cache.name != "demo":
        raise ConfigError(f"--cache: got {folder}, a cache of {cache.name!r}, expected one that prepare demo wrote")
    return cache


def _held_out(out: Path, cache: Cache, given: bool) -> tuple[Path, Path]:
    """A held-out image as a file, and the file of its label map: a volume, or a slice of a cache that was given."""
    from simmp_fast.data import demo_slice, demo_volume

    if given:
        head, target = out / "held_out_slice.png", out / "prediction.png"
        demo_slice(head, cache)
    else:
        head, target = out / "held_out_slab.nii.gz", out / "prediction.nii.gz"
        if not head.exists():
            demo_volume(head)
    return head, target


def _configuration(arguments: argparse.Namespace, image_size: int) -> Config:
    from simmp_fast.config import Config, from_mapping, merge, parse_override, preset, to_mapping

    layers = [
        {"train": {"backend": arguments.backend}, "model": {"image_size": image_size}},
        *map(parse_override, arguments.set),
    ]
    return from_mapping(Config, merge(to_mapping(preset("small")), *layers))


def run(arguments: argparse.Namespace) -> int:
    """Four steps; an interrupted demo goes on where it stood, a finished one predicts and evaluates again."""
    from simmp_fast.evaluation.evaluate import evaluate
    from simmp_fast.evaluation.predict import predict
    from simmp_fast.training import train

    out: Path = arguments.out
    device = choose_device(arguments.device)
    folder = out / "run"

    print("[1/4] prepare: axial slices of the ICBM 2009a template, held-out slabs apart")
    cache = _prepared(out / "cache") if arguments.cache is None else _given(arguments.cache)

    print(f"[2/4] train: the small preset on {device}, a quarter of an hour on two cores")
    config = _configuration(arguments, cache.image_size)
    result = train(config, cache, folder, resume=folder.is_dir() and any(folder.iterdir()), device=device)
    if result.interrupted:
        return 130

    head, target = _held_out(out, cache, given=arguments.cache is not None)
    print(f"[3/4] predict: {head.name}")
    model, weights = load_network(folder, arguments.backend)
    predicted = predict(
        model, load_recipe(weights, None), head, target, overlays=True, overwrite=True, device=device, progress=True
    )

    print("[4/4] evaluate: the held-out test slab")
    evaluation = evaluate(model, cache, "test", protocol="strict", device=device, progress=True)
    saved = evaluation.save(out / "evaluation", overwrite=True)
    shown = {
        "prediction": predicted[0],
        "its overlay": predicted[-1],
        "validation": folder / "overlays.png",
        "curves": folder / "curves.png",
        "all numbers": saved[0],
    }
    print()
    for what, path in shown.items():
        print(f"{what:12} {path}")
    print("\nOne averaged head, its own slices held out: this shows that the program works, not how accurate it is.\n")
    print(evaluation.table())
    return 0
