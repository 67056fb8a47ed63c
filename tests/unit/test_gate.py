"""The gate opens only for a gain that the test, the control and every number of shots agree on."""

from __future__ import annotations

import pytest

from abacist.proof.comparison.compare import compare
from abacist.proof.comparison.gate import least_gain, pair_gate, seeds_gate
from abacist.proof.comparison.sides import Side
from evaluated import GOOD, WRONG, evaluation


def side(name: str, right: int, of: int = 40, **settings: object) -> Side:
    return Side(name, evaluation([GOOD] * right + [WRONG] * (of - right)), settings=dict(settings))


def test_a_sure_gain_is_the_lower_bound_and_chance_is_none() -> None:
    a, b = side("a", 5), side("b", 30)
    gate = pair_gate(a, b)
    assert gate.control is None and gate.notes == []
    assert gate.sure_gain == gate.found.accuracy.change.low > 0.3
    assert pair_gate(a, side("b", 7)).sure_gain is None
    assert pair_gate(b, a).sure_gain is None


def test_a_control_that_does_as_well_closes_the_gate_and_one_that_is_none_is_named() -> None:
    a, b = side("a", 5), side("b", 30, control="none", beta=0.0)
    as_good = side("c", 29, control="random", beta=0.0)
    assert pair_gate(a, b, as_good).sure_gain is None
    weak = pair_gate(a, b, side("c", 8, control="none", beta=0.1))
    assert weak.control is not None and weak.sure_gain is not None
    assert weak.sure_gain == weak.control.beyond.accuracy.change.low
    assert ["was not trained as a control" in weak.notes[0], "beta" in weak.notes[1]] == [True] * 2
    assert weak.control.to_json()["real_minus_control"]["control"] == "none"


def test_seeds_that_are_the_same_or_differ_in_more_are_named() -> None:
    base, runs = side("base", 5), [side(f"r{n}", 25 + n, seed=n // 2, lr=n // 3) for n in range(4)]
    gate = seeds_gate([base] * 4, runs)
    assert gate.sure_gain == gate.found.combined.low > 0
    assert "r3 differs from r0" in gate.notes[0] and "same seed" in gate.notes[1]
    assert seeds_gate([base] * 2, [runs[0], runs[2]]).notes == []


@pytest.mark.parametrize(("rights", "is_gain"), [([20, 30], True), ([20, 6], False)])
def test_the_least_of_several_gains_counts(rights: list[int], is_gain: bool) -> None:
    a = side("a", 5).evaluation
    found = [compare(a, side("b", right).evaluation) for right in rights]
    assert (least_gain(*found) is not None) is is_gain
