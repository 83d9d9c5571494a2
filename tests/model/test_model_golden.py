"""DS-GIM, W-LD, the update of a DMW-LA block and the whole network against the released code, in float64."""

from __future__ import annotations

import golden_recipe
import pytest
import torch
from golden_data import golden, relative_error, released_state_dict

from simmp_fast import reference
from simmp_fast.config import preset
from simmp_fast.model import DSGIM, DMWLABlock, MemoryBank, SimMPNet, UpdateWidth
from simmp_fast.model.dsgim import decay
from simmp_fast.reference.decay_weights import similar_tokens

TOLERANCE = 1e-10
STORED_FLOAT32 = 1e-6  # arrays that the golden files hold in float32


def test_decays() -> None:
    expected = golden("window_similarity")["decay12"]
    assert relative_error(torch.tensor([decay(i) for i in range(12)], dtype=torch.float64), expected) < TOLERANCE


@pytest.mark.parametrize("suffix", ["", "_28x14"])
def test_similar_windows(suffix: str) -> None:
    case = golden("window_similarity")
    window, grid = int(case["window"]), tuple(case[f"x{suffix}"].shape[-2:])
    score = reference.window_similarity(case[f"x{suffix}"], window)
    similar = similar_tokens(score, grid, window)
    assert torch.equal(similar.view(-1, *grid), case[f"similar{suffix}"])


def test_ties_between_windows_go_to_the_lower_index() -> None:
    similar = similar_tokens(torch.ones(1, 4), (2, 2), 1)
    assert similar.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_dsgim_module(variant: str) -> None:
    case = golden("dsgim_module")
    module = DSGIM(384, 7, variant=variant, backend="reference")
    names = {"mix.": "DSGIM.fc.", "refine.": "DSGIM.ConvBlock.conv.", "": "DSGIM."}
    state = {}
    for own, tensor in module.state_dict().items():
        prefix = next(p for p in names if own.startswith(p))
        released = names[prefix] + own.removeprefix(prefix)
        if tensor.is_floating_point():
            # The recipe scales by fan-in, which a 1x1 convolution and a linear layer share.
            tensor = torch.from_numpy(golden_recipe.tensor(released, tuple(tensor.shape)))
        state[own] = tensor
    module.load_state_dict(state)
    module.double().eval()
    x = case["x"].double()
    score = reference.window_similarity(x, 7)
    assert relative_error(score, case["window_score"]) < TOLERANCE
    assert torch.equal(similar_tokens(score, (14, 14), 7).view(-1, 14, 14), case["similar"])
    with torch.no_grad():
        assert relative_error(module(x, float(case["gamma_paper"])), case[f"y_{variant}"]) < STORED_FLOAT32


def test_dsgim_golden_decay_is_one_of_the_network() -> None:
    gamma = float(golden("dsgim_module")["gamma_paper"])
    assert min(abs(gamma - decay(i)) for i in range(6)) < 1e-12


def test_w_ld() -> None:
    case = golden("wld")
    for previous, current, k in zip(case["previous"], case["current"], case["k"], strict=True):
        width = UpdateWidth(100)
        width.step(previous)
        assert width.k == 50, "the first loss is only remembered"
        width.step(current)
        assert width.k == k, (float(previous), float(current))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("reassociate", [False, True], ids=["plain", "reassociated"])
def test_dmwla_block_after_a_training_step(name: str, reassociate: bool) -> None:
    case = golden(f"dmwla_{name}")
    clusters, slots, dim = case["memory"].shape
    bank = MemoryBank(clusters, slots, dim, warmup_steps=1, rate=float(case["rate"]), backend="reference")
    block = DMWLABlock(case["x"].shape[1], dim, bank, key_momentum=float(case["phi_momentum"]), backend="reference")
    block.double()
    block.reassociate = reassociate
    weights = {"query": "theta", "key": "phi", "value": "g", "output": "o"}
    state = {f"{own}.weight": case[released] for own, released in weights.items()}
    state |= {"momentum_key": case["phi_k"], "bank.memory": case["memory"], "bank.prototypes": case["prototypes"]}
    block.load_state_dict(state | {"bank._extra_state": torch.tensor(1)})
    x = case["x"].clone().requires_grad_()
    y = block(x)
    assert relative_error(y, case["y"]) < TOLERANCE
    y.backward(case["cotangent"])
    assert relative_error(x.grad, case["dx"]) < TOLERANCE
    for own, released in weights.items():
        assert relative_error(getattr(block, own).weight.grad, case[f"d{released}"]) < TOLERANCE, own
    block.commit_memory(case["k"])
    assert relative_error(bank.memory, case["memory_after"]) < TOLERANCE
    assert relative_error(bank.prototypes, case["prototypes_after"]) < TOLERANCE
    assert relative_error(block.momentum_key, case["phi_k_after"]) < TOLERANCE


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("reassociate", [False, True], ids=["plain", "reassociated"])
def test_dmwla_block_in_warmup(name: str, reassociate: bool) -> None:
    case, structured = golden(f"dmwla_warmup_{name}"), golden(f"dmwla_{name}")
    bank = MemoryBank(*structured["memory"].shape, backend="reference")
    block = DMWLABlock(case["x"].shape[1], structured["memory"].shape[-1], bank, backend="reference").double()
    block.reassociate = reassociate
    weights = {"query": "theta", "key": "phi", "value": "g", "output": "o"}
    block.load_state_dict({f"{own}.weight": case[r] for own, r in weights.items()}, strict=False)
    x = case["x"].clone().requires_grad_()
    y = block(x)
    assert relative_error(y, case["y"]) < TOLERANCE
    y.backward(case["cotangent"])
    assert relative_error(x.grad, case["dx"]) < TOLERANCE
    for own, released in weights.items():
        assert relative_error(getattr(block, own).weight.grad, case[f"d{released}"]) < TOLERANCE, own


@pytest.mark.parametrize(("case", "channels"), [("gray_b2", 1), ("rgb_b1", 3)])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_whole_network(variant: str, case: str, channels: int) -> None:
    image = golden("model_released")[f"{case}_x"].double()
    expected = golden(f"model_{variant}")
    model = SimMPNet.from_released(released_state_dict(), variant, in_channels=channels, backend="reference")
    model.double().eval()
    with torch.no_grad():
        heads = model(image)
    for i, head in enumerate(heads, start=1):
        stored = expected[f"{case}_p{i}"]
        tolerance = TOLERANCE if stored.dtype == torch.float64 else STORED_FLOAT32
        assert relative_error(head[:, :, ::8, ::8], stored) < tolerance, f"p_{i}"


@pytest.mark.parametrize(("name", "millions"), [("acdc", 91.30), ("synapse", 93.57)])
def test_parameter_count_is_the_published_one(name: str, millions: float) -> None:
    model = SimMPNet(preset(name).model)
    assert round(model.parameter_count() / 1e6, 2) == millions
