"""Compiled kernels for a GPU machine, made on another machine that has no GPU.

    python -m bench.warm make warm.tar.xz --capability 9.0   # on the build machine
    python -m bench.warm check warm.tar.xz                   # there too: every launch again, misses are named
    python -m bench.warm unpack warm.tar.xz --to DIR         # on the GPU machine; then TRITON_CACHE_DIR=DIR

Both machines need the same Triton wheel and the same minor version of Python: Triton's keys hold the compiler, the
kernels' source with its line numbers, constants and options, but no path and no device. `make` launches what the GPU
tests, the sanitizers, the training step, the benchmark of the operators and the first round of the tuning launch, on
the null GPU (`bench.nullgpu`). Whatever is not hit is compiled on the GPU machine as always.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import nullgpu
from .lease.device import software
from .lease.record import read

ROOT = Path(__file__).parents[1]
MANIFEST, CANDIDATES = "manifest.json", "candidates.jsonl"
GROUP = "__grp__"
# What a launch reads: machine code and what is known of it, and the host's own launchers.
KEPT = (".cubin", ".json", ".so")
# Kernels resemble one another: a window over most of them is worth more than a thorough search.
PACKING = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 128 * 2**20}]
# All but what Inductor compiles, or trains.
TESTS = "gpu and not compiles and not convergence"
PARTS = ("tests", "sanitizer", "step", "operators", "tuning")


def commands(part: str, jobs: int, folder: Path) -> Iterator[list[str]]:
    """The programs that launch all kernels of a part.

    Args:
        part: of `PARTS`.
        jobs: processes where a program can share its work.
        folder: for what they write.
    """
    python = sys.executable
    if part == "tests":
        shared = ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
        yield [python, "-m", "pytest", "tests/gpu", "-m", TESTS, "-q", "-p", "no:cacheprovider", *shared]
    elif part == "sanitizer":
        yield [python, "tests/gpu/sanitized.py"]
    elif part == "step":
        for side, batch in ((256, 20), (128, 8)):
            yield [python, "-m", "bench.warm", "steps", "--side", str(side), "--batch", str(batch)]
    elif part == "operators":
        groups = ["operators", "blocks", "context", "dsgim", "loss"]
        measured = ["--backend", "triton", "--no-baseline", "--seconds", "0.01", "--device", "cuda"]
        yield [
            python, "-m", "simmp_fast.cli", "bench", "--group", *groups, *measured, "--out", str(folder / "operators")
        ]  # fmt: skip
    elif part == "tuning":
        yield [
            python, "-m", "simmp_fast.kernels.tune", "--dtype", "half", "--precompile", str(folder / CANDIDATES)
        ]  # fmt: skip


def steps(side: int, batch: int) -> None:
    """A training step in warm-up and one with a structured memory, in both layouts and dtypes, on the GPU at hand."""
    import torch

    from . import network
    from .backends import BACKENDS

    for dtype in (torch.bfloat16, torch.float32):
        made = network.make({"B": batch, "side": side}, dtype, torch.device("cuda"))
        for name in ("triton", "triton-channels-last"):
            for begun in (False, True):
                for block in made.model.memory_blocks():
                    block.bank.set_extra_state(torch.tensor(made.model.config.warmup_steps if begun else 0))
                taking = made.steps()
                taking.take(BACKENDS[name])
                taking.forget(BACKENDS[name])
                print(f"step: {name}, {dtype}, {'structured' if begun else 'warm-up'}", flush=True)


def launch_all(
    parts: Sequence[str], capability: tuple[int, int], jobs: int, cache: Path, folder: Path, log: Path
) -> list[str]:
    """Run the programs of some parts on the null GPU; returns those that failed, with the end of what they said.

    Args:
        parts: of `PARTS`.
        capability: of the null GPU.
        jobs: processes at once.
        cache: Triton's.
        folder: for what the programs write and say.
        log: JSON lines, one a kernel compiled or found.
    """
    environment = nullgpu.environment(capability)
    environment |= {"TRITON_CACHE_DIR": str(cache), "NULLGPU_COMPILED": str(log), "OMP_NUM_THREADS": "1"}
    wrong = []
    for part in parts:
        for number, command in enumerate(commands(part, jobs, folder)):
            said = folder / f"{part}-{number}.log"
            print(f"{part}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
            with open(said, "wb") as file:
                status = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file).returncode
            if status:
                end = said.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                wrong.append("\n".join([f"{part}: exit status {status} of {' '.join(command)}", *end]))
    return wrong


def manifest(capability: tuple[int, int]) -> dict[str, Any]:
    """What has to be the same where the cache is used."""
    return {"capability": list(capability), "python": ".".join(platform.python_version_tuple()[:2]), **software()}


def pack(cache: Path, file: Path, about: dict[str, Any], candidates: Path | None = None) -> int:
    """Write a cache's kernels to an archive, in one step; returns its bytes.

    Only what a launch reads is packed, without paths, and in the order of the names: the same cache gives the same
    archive.
    """
    fresh = file.with_name(f".{os.getpid()}-{file.name}")
    file.parent.mkdir(parents=True, exist_ok=True)

    def add(bundle: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        bundle.addfile(member, io.BytesIO(content))

    try:
        with lzma.open(fresh, "wb", filters=PACKING) as packed, tarfile.open(fileobj=packed, mode="w") as bundle:
            add(bundle, MANIFEST, json.dumps(about, indent=1).encode())
            if candidates is not None and candidates.exists():
                add(bundle, CANDIDATES, candidates.read_bytes())
            for path in sorted(cache.glob("*/*")):
                if path.name.startswith(GROUP):
                    names = [name for name in json.loads(path.read_text())["child_paths"] if name.endswith(KEPT)]
                    add(bundle, f"{path.parent.name}/{path.name}", json.dumps(sorted(names)).encode())
                elif path.suffix in KEPT:
                    add(bundle, f"{path.parent.name}/{path.name}", path.read_bytes())
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
    return file.stat().st_size


def unpack(file: Path, folder: Path) -> dict[str, Any]:
    """Put an archive's kernels into a folder, for `TRITON_CACHE_DIR`; returns the archive's manifest.

    Raises:
        ValueError: the file is no such archive.
    """
    folder = folder.resolve()
    try:
        with tarfile.open(file) as bundle:
            for member in bundle:
                content = bundle.extractfile(member)
                name = Path(member.name)
                if content is None or name.is_absolute() or ".." in name.parts or len(name.parts) > 2:
                    raise ValueError(f"got the member {member.name!r}")
                data = content.read()
                if name.name.startswith(GROUP):
                    paths = {child: str(folder / name.parent / child) for child in json.loads(data)}
                    data = json.dumps({"child_paths": paths}).encode()
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"{file}: not an archive of compiled kernels ({error})") from None
    return found


def differences(made: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Why kernels of an archive will not be found here, in words; none where they will."""
    return [
        f"{name}: made with {made.get(name)}, here is {here.get(name)}" for name in here if made.get(name) != here[name]
    ]


def make(options: argparse.Namespace) -> int:
    """Compile, and pack."""
    cache = options.cache or Path(tempfile.gettempdir()) / f"simmp_fast_warm_{options.capability}"
    capability = parse_capability(options.capability)
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / "compiled.jsonl"
    log.unlink(missing_ok=True)
    wrong = launch_all(options.parts, capability, options.jobs, cache, cache, log)
    lines = list(read(log))
    new = [line for line in lines if not line["hit"]]
    size = pack(cache, options.file, manifest(capability), cache / CANDIDATES)
    known = len({line["hash"] for line in lines})
    print(
        f"{known} kernels, {len(new)} compiled now in {sum(line['seconds'] for line in new):.0f} s of work; "
        f"{options.file}: {size / 2**20:.1f} MiB"
    )
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def check(options: argparse.Namespace) -> int:
    """Launch everything again from a fresh copy of the cache and name what was not in it."""
    folder = Path(tempfile.mkdtemp(prefix="simmp_fast_warm_check_"))
    try:
        made = unpack(options.file, folder / "cache")
        log = folder / "compiled.jsonl"
        parts = [part for part in options.parts if part != "tuning"]
        wrong = launch_all(parts, tuple(made["capability"]), options.jobs, folder / "cache", folder, log)
        lines = list(read(log))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    misses = Counter(line["kernel"] for line in lines if not line["hit"])
    hits = sum(line["hit"] for line in lines)
    print(f"{hits} hits, {sum(misses.values())} misses")
    for kernel, count in misses.most_common():
        print(f"  missed: {kernel}, {count} times")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if misses or wrong else 0


def parse_capability(text: str) -> tuple[int, int]:
    """``"9.0"`` as two numbers."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where something failed or was missed, 2 for what cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("make", "compile and pack"), ("check", "launch everything again and name what was missed")):
        one = actions.add_parser(name, help=text)
        one.add_argument("file", type=Path, help="the archive")
        one.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="(default: all)")
        one.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a processor)")
        if name == "make":
            one.add_argument("--capability", default="9.0", help="of the GPU (default: 9.0)")
            one.add_argument("--cache", type=Path, help="kept from run to run, so that it can be interrupted")
    one = actions.add_parser("unpack", help="for TRITON_CACHE_DIR, on the GPU machine")
    one.add_argument("file", type=Path)
    one.add_argument("--to", type=Path, required=True, metavar="DIR")
    one = actions.add_parser("steps", help="the training step's kernels alone, on the GPU at hand")
    one.add_argument("--side", type=int, default=256)
    one.add_argument("--batch", type=int, default=20)
    options = parser.parse_args(arguments)
    try:
        if options.action == "make":
            return make(options)
        if options.action == "check":
            return check(options)
        if options.action == "steps":
            steps(options.side, options.batch)
            return 0
        made = unpack(options.file, options.to)
    except (ValueError, OSError, nullgpu.NullGPUError) as error:
        print(error, file=sys.stderr)
        return 2
    for text in differences(made, {**manifest(tuple(made["capability"]))}):
        print(f"kernels will be compiled here: {text}")
    print(f"{sum(1 for _ in options.to.glob('*/*.cubin'))} kernels for TRITON_CACHE_DIR={options.to.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
