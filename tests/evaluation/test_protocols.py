"""What empty masks and spacing mean under each protocol."""

from __future__ import annotations

import numpy as np
import pytest

from simmp_fast.evaluation.protocols import PROTOCOLS, get_protocol

EMPTY = np.zeros((4, 5, 6), np.uint8)
FULL = np.ones((4, 5, 6), np.uint8)


def scores(protocol: str, prediction: np.ndarray, truth: np.ndarray) -> tuple[float | None, ...]:
    score = get_protocol(protocol).score(prediction, truth, 2, (3.0, 0.5, 0.5))[0]
    return score.dice, score.hd95, score.jaccard, score.asd


@pytest.mark.parametrize(
    ("protocol", "prediction", "truth", "expected"),
    [
        ("published", FULL, EMPTY, (1, 0, 1, 0)),
        ("published", EMPTY, FULL, (0, 0, 0, 0)),
        ("published", EMPTY, EMPTY, (0, 0, 0, 0)),
        ("published", FULL, FULL, (1, 0, 1, 0)),
        ("strict", FULL, EMPTY, (0, None, 0, None)),
        ("strict", EMPTY, FULL, (0, None, 0, None)),
        ("strict", EMPTY, EMPTY, (None, None, None, None)),
        ("strict", FULL, FULL, (1, 0, 1, 0)),
    ],
)
def test_empties(protocol: str, prediction: np.ndarray, truth: np.ndarray, expected: tuple[float | None, ...]) -> None:
    assert scores(protocol, prediction, truth) == expected


def test_units() -> None:
    """Two voxels a slice apart: 1 voxel under `published`, 3 mm under `strict`."""
    prediction, truth = EMPTY.copy(), EMPTY.copy()
    prediction[1, 2, 2] = truth[2, 2, 2] = 1
    assert scores("published", prediction, truth)[1] == 1.0
    assert scores("strict", prediction, truth)[1] == 3.0
    assert get_protocol("published").unit == "voxel"
    assert get_protocol("strict").unit == "mm"


def test_strict_needs_spacing() -> None:
    with pytest.raises(ValueError, match="spacing: got None"):
        get_protocol("strict").score(FULL, FULL, 2, None)


def test_unknown_protocol_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="protocol: got 'medical', expected one of 'published', 'strict'"):
        get_protocol("medical")
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
