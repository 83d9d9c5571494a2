"""The registry: every case of the benchmark, one list for the command line, for pytest and for the tests.

The shapes are those of the network with the `synapse` preset; the batch is 20 on a GPU, as the recipe has it, and 1 on
a CPU unless asked for otherwise. Sweeps change one size of an operator's own default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from simmp_fast.config import ConfigError
from simmp_fast.validation import check_choice

FAST, USUAL, EVERYTHING = 0, 1, 2
GPU_BATCH, CPU_BATCH = 20, 1


@dataclass(frozen=True)
class Case:
    """What to measure, for any backend, dtype and device.

    Attributes:
        operator: name in `problems.PROBLEMS`, or one of `WHOLE`.
        sizes: by name, as the formulas and problems read them.
        group: why it is measured.
        label: where the shape comes from.
        uses: how often the network uses it in one forward pass.
        compiled: whether the compiled forms are measured without being asked for by name.
        tier: FAST cases run in the fast mode, USUAL ones on a CPU, EVERYTHING on a GPU or when asked for.
    """

    operator: str
    sizes: Mapping[str, int] = field(hash=False)
    group: str
    label: str = ""
    uses: int = 1
    compiled: bool = False
    tier: int = USUAL

    @property
    def name(self) -> str:
        """``group/operator[B=1,N=196]``, as pytest and the progress bar show it."""
        return f"{self.group}/{self.operator}[{','.join(f'{k}={v}' for k, v in self.sizes.items())}]"


# Side of the grid, C, D, K, and how many blocks have them: encoder stages 1 to 4, decoder levels 1 to 4.
BLOCKS: tuple[tuple[str, int, int, int, int, int], ...] = (
    ("encoder stage 1", 56, 96, 256, 9, 2),
    ("encoder stage 2", 28, 192, 256, 9, 2),
    ("encoder stage 3", 14, 384, 256, 9, 6),
    ("encoder stage 4", 7, 768, 256, 9, 2),
    ("decoder level 1", 56, 96, 128, 10, 1),
    ("decoder level 2", 28, 192, 128, 10, 1),
    ("decoder level 3", 14, 384, 128, 10, 1),
    ("decoder level 4", 7, 768, 128, 10, 1),
)
REASSOCIATED = "encoder stage 1, reassociated"
SLOTS = 100
_BANK = {"D": 256, "K": 9, "M": SLOTS}

# An operator's sizes where nothing else is said: the largest the network has.
DEFAULTS: dict[str, dict[str, int]] = {
    "assign_clusters": {"B": 1, "N": 3136, "D": 256, "K": 9},
    "context_attention": {"B": 1, "N": 3136, "D": 256},
    "memory_attention": {"B": 1, "N": 3136, **_BANK},
    "memory_context_attention": {"B": 1, "N": 3136, **_BANK},
    "update_memory": {"B": 1, "N": 3136, **_BANK, "k": 50},
    "window_similarity": {"B": 1, "C": 384, "H": 14, "W": 14, "window": 7},
    "decay_weights": {"B": 1, "H": 14, "W": 14, "window": 7},
    "split_threshold": {"B": 1, "N": 196, "C": 384},
    "split_attention": {"B": 1, "N": 196, "C": 384},
    "powerset_loss": {"B": 1, "classes": 9, "grid": 56, "side": 256},
    "dmwla_block": {"B": 1, "N": 3136, "C": 96, **_BANK, "k": 50},
    "dsgim": {"B": 1, "C": 384, "H": 14, "W": 14, "window": 7},
    "network_forward": {"B": 1, "side": 256},
    "training_step": {"B": 1, "side": 256},
    "evaluation": {"slices": 148, "side": 512, "classes": 8, "defined": 1},
    "data_loader": {"side": 256, "slices": 160, "batch": 20, "workers": 0},
}
STEP, FORWARD = "training_step", "network_forward"
NETWORK = (FORWARD, STEP)
AROUND = ("evaluation", "data_loader")
WHOLE = (*NETWORK, *AROUND)
# What follows the step's name in rows of its parts; they add up to the step.
PARTS = ("backbone", "dmwla", "dsgim", "decoder", "loss", "memory_update", "optimiser", "other")
WITHOUT_BACKBONE = "without_backbone"
OPERATORS = tuple(DEFAULTS)

# What the fast mode measures: one tiny case of everything, odd sizes among them.
_TINY: dict[str, dict[str, int]] = {
    "assign_clusters": {"B": 2, "N": 33, "D": 16, "K": 3},
    "context_attention": {"B": 2, "N": 33, "D": 16},
    "memory_attention": {"B": 2, "N": 33, "D": 16, "K": 3, "M": 10},
    "memory_context_attention": {"B": 2, "N": 33, "D": 16, "K": 3, "M": 10},
    "update_memory": {"B": 2, "N": 33, "D": 16, "K": 3, "M": 10, "k": 5},
    "window_similarity": {"B": 2, "C": 16, "H": 8, "W": 8, "window": 4},
    "decay_weights": {"B": 2, "H": 8, "W": 8, "window": 4},
    "split_threshold": {"B": 2, "N": 33, "C": 16},
    "split_attention": {"B": 2, "N": 33, "C": 16},
    "powerset_loss": {"B": 2, "classes": 3, "grid": 8, "side": 32},
    "dmwla_block": {"B": 2, "N": 36, "C": 8, "D": 16, "K": 3, "M": 10, "k": 5},
    "dsgim": {"B": 2, "C": 16, "H": 8, "W": 8, "window": 4},
    "network_forward": {"B": 2, "side": 64},
    "training_step": {"B": 2, "side": 64},
    "evaluation": {"slices": 24, "side": 48, "classes": 3, "defined": 3},
    "data_loader": {"side": 64, "slices": 32, "batch": 8, "workers": 0},
}

# Which size is swept, on which operators, over what; the second tuple on a CPU.
_SWEEPS: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("N", "memory_context_attention", (196, 784, 1568, 3136, 6272, 12544), (196, 784, 3136, 12544)),
    ("N", "context_attention", (196, 784, 1568, 3136, 6272, 12544), ()),
    ("N", "split_attention", (196, 784, 1568, 3136, 6272, 12544), (196, 784, 3136)),
    ("N", "update_memory", (196, 784, 1568, 3136, 6272, 12544), (196, 784, 3136, 12544)),
    ("K", "memory_attention", (1, 4, 9, 16, 32), (1, 9, 32)),
    ("K", "update_memory", (1, 4, 9, 16, 32), (1, 9, 32)),
    ("M", "memory_attention", (16, 50, 100, 200, 400), (16, 100, 400)),
    ("M", "update_memory", (50, 100, 200, 400), (50, 100, 400)),
    ("D", "memory_context_attention", (32, 64, 96, 128, 192, 256), (32, 96, 256)),
    ("B", "memory_context_attention", (1, 2, 5, 10, 20), (1, 2, 4)),
    ("B", "powerset_loss", (1, 2, 5, 10, 20), (1, 2, 4)),
)
# Sizes that the sweeps of K, M, D and batch keep; the grid of stage 2.
_SWEEP_TOKENS = 784
# Feature dimension of the sweep over N on a CPU, the decoder's: the yardstick at N = 12,544 fits in 16 GB with it.
_CPU_SWEEP_DIM = 128


def registry(device: str, batch: int | None = None) -> list[Case]:
    """All cases, in the order in which they run.

    Args:
        device: "cpu" or "cuda"; decides the default batch and how fine the sweeps are.
        batch: images; the sweep over the batch keeps its own.
    """
    images = batch if batch is not None else GPU_BATCH if device == "cuda" else CPU_BATCH
    cases = [Case(name, sizes, "fast", "tiny", compiled=False, tier=FAST) for name, sizes in _TINY.items()]
    sized = {name: with_batch(sizes, images) for name, sizes in DEFAULTS.items()}
    compiled = {"memory_context_attention", "split_attention"} if device == "cuda" else {"memory_context_attention"}
    alone = [name for name in DEFAULTS if name not in (*WHOLE, "dmwla_block", "dsgim", "powerset_loss")]
    cases += [
        Case(name, sized[name], "operators", "the network's largest", compiled=name in compiled) for name in alone
    ]
    reassociated = {**sized["context_attention"], "D": 96}
    cases.append(Case("context_attention", reassociated, "operators", REASSOCIATED))
    for index, (label, side, channels, dim, clusters, uses) in enumerate(BLOCKS):
        sizes = {"B": images, "N": side * side, "C": channels, "D": dim, "K": clusters, "M": SLOTS, "k": 50}
        cases.append(Case("dmwla_block", sizes, "blocks", label, uses, compiled=index == 0))
    for label, tokens, width, uses in contexts():
        sizes = {"B": images, "N": tokens, "D": width}
        cases.append(Case("context_attention", sizes, "context", label, uses, tier=EVERYTHING))
    cases.append(Case("dsgim", sized["dsgim"], "dsgim", "six uses in encoder stage 3", 6))
    cases.append(Case("powerset_loss", sized["powerset_loss"], "loss", "the training step's", compiled=True))
    for swept, name, fine, coarse in _SWEEPS:
        for value in fine:
            base = with_batch(DEFAULTS[name], images if device == "cuda" and swept != "N" else 1)
            if swept != "N" and "N" in base:
                base["N"] = _SWEEP_TOKENS
            elif device != "cuda" and "D" in base:
                base["D"] = _CPU_SWEEP_DIM
            sizes = {**base, swept: value}
            tier = USUAL if value in coarse else EVERYTHING
            cases.append(Case(name, sizes, f"sweep {swept}", f"sweep over {swept}", tier=tier))
    cases.append(Case("network_forward", sized["network_forward"], "network", "evaluation mode"))
    on_gpu = device == "cuda"  # to compile the whole network takes many minutes on a few cores
    cases.append(Case("training_step", sized["training_step"], "step", "structured memory", compiled=on_gpu))
    cases.append(Case("evaluation", DEFAULTS["evaluation"], "evaluation", "both distance metrics"))
    cases += [
        Case("data_loader", {**DEFAULTS["data_loader"], "workers": n}, "data", "from the prepared cache")
        for n in (0, 2)
    ]
    return cases


def contexts() -> list[tuple[str, int, int, int]]:
    """Label, tokens, width and uses of each shape of context attention in the network, reassociated where C < D."""
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for label, side, channels, dim, _, uses in BLOCKS:
        shape = (side * side, min(channels, dim))
        first, before = found.get(shape, (label, 0))
        found[shape] = (first, before + uses)
    return [(label, *shape, uses) for shape, (label, uses) in found.items()]


def with_batch(sizes: Mapping[str, int], images: int) -> dict[str, int]:
    """`sizes` with ``B`` images, where they have a batch."""
    return {**sizes, "B": images} if "B" in sizes else dict(sizes)


def parse_shape(text: str) -> dict[str, int]:
    """``"N=784,D=128"`` as sizes by name.

    Raises:
        ConfigError: something else.
    """
    sizes = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not value.strip().isdigit():
            raise ConfigError(f"--shape: got {text!r}, expected sizes by name such as N=784,D=128")
        sizes[name.strip()] = int(value)
    return sizes


def select(
    device: str,
    operators: Sequence[str] = (),
    groups: Sequence[str] = (),
    shapes: Sequence[Mapping[str, int]] = (),
    batch: int | None = None,
    fast: bool = False,
    everything: bool = False,
) -> list[Case]:
    """The cases that a command line asks for.

    Args:
        device: "cpu" or "cuda".
        operators: names; all by default.
        groups: groups; all but the fast one by default.
        shapes: sizes that replace those of each operator's default case; then nothing else is measured.
        batch: images.
        fast: only the tiny cases.
        everything: the finest sweeps on a CPU too.

    Raises:
        ConfigError: an unknown operator, group or size, or a selection without any case.
    """
    cases = registry(device, batch)
    known = sorted({case.group for case in cases})
    for name in operators:
        if name not in OPERATORS:
            raise ConfigError(f"operator: got {name!r}, expected one of {', '.join(OPERATORS)}")
    for group in groups:
        if group not in known:
            raise ConfigError(f"--group: got {group!r}, expected one of {', '.join(map(repr, known))}")
    if shapes:
        return _custom(cases, operators, shapes, batch)
    tier = EVERYTHING if device == "cuda" or everything else USUAL
    kept = [case for case in cases if (case.tier == FAST if fast else FAST < case.tier <= tier)]
    kept = [case for case in kept if not operators or case.operator in operators]
    kept = [case for case in kept if not groups or case.group in groups]
    if not kept:
        raise ConfigError("this selection holds no case; --list shows all there are, and with --all the rest on a CPU")
    return kept


def _custom(
    cases: Sequence[Case], operators: Sequence[str], shapes: Sequence[Mapping[str, int]], batch: int | None
) -> list[Case]:
    """One case for each operator and shape."""
    if not operators:
        raise ConfigError("--shape: got no operator that it belongs to, expected one such as context_attention")
    made = []
    for name in operators:
        base = DEFAULTS[name] if batch is None else with_batch(DEFAULTS[name], batch)
        for shape in shapes:
            unknown = [size for size in shape if size not in base]
            if unknown:
                raise ConfigError(f"--shape: {name} has no size {unknown[0]!r}, expected some of {', '.join(base)}")
            made.append(replace(Case(name, {**base, **shape}, "asked", "asked for"), compiled=False))
    return made


def check_direction(direction: str) -> None:
    """Raise `ValueError` unless it is a direction."""
    check_choice("direction", direction, ("forward", "backward", "both"))
