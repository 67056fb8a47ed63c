"""Two policies are compared token by token, and what is not the same is found out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from abacist.delivery import same_policy
from abacist.delivery.same_policy import Agreement, Proof, Read, agreement, read_replies
from abacist.errors import ModelError
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.loading import Policy, load_policy
from abacist.policy.scoring import teacher_forced
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import Evaluation
from abacist.task.problems import load_problems
from evaluated import GOOD, WRONG, evaluation


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("tiny", dtype="float32")


@pytest.fixture(scope="module")
def replies(policy: Policy) -> Evaluation:
    problems = load_problems("generated", split="heldout", limit=20)
    return evaluate(policy, problems, max_completion_tokens=40, rewards=[])


def test_a_policy_agrees_with_itself_at_every_token(policy: Policy, replies: Evaluation) -> None:
    reads = read_replies(policy, replies, nothing)
    written = [list(reply.completion_ids) for reply in replies.rollouts]
    found = agreement(reads, read_replies(policy, replies, nothing, reads), written)
    assert found.equal_replies + found.tied_replies == found.replies == 20
    assert found.largest_logp_difference < 1e-5 and found.kl_a_token < 1e-9
    assert found.tokens == sum(map(len, written)) and found.equal_share == 1.0


def test_batched_reading_equals_the_models_own_forward(
    policy: Policy, replies: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different lengths, whose prompts begin alike, against one row after another."""
    assert unsupported_reason(policy.model, FastPart.SCORING) is None
    packed = read_replies(policy, replies, nothing)
    monkeypatch.setattr(teacher_forced, "unsupported_reason", lambda model, part: "not here")
    plain = read_replies(policy, replies, nothing, packed)
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one.written_C, other.written_C, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.logps_CK, other.logps_CK, atol=1e-3, rtol=0)


def test_another_policy_is_told_apart(policy: Policy, replies: Evaluation, tmp_path: Path) -> None:
    other = load_policy("tiny", dtype="float32")
    with torch.no_grad():
        other.model.model.norm.weight.mul_(1.01)
    reads = read_replies(policy, replies, nothing)
    written = [list(reply.completion_ids) for reply in replies.rollouts]
    found = agreement(reads, read_replies(other, replies, nothing, reads), written)
    assert Proof("a test", True, found, None).fault is not None
    assert found.kl_a_token > 0


def test_the_divergence_of_two_distributions_is_kullback_and_leiblers() -> None:
    p = torch.tensor([[0.5, 0.3, 0.1]]).double()
    q = torch.tensor([[0.4, 0.4, 0.1]]).double()
    by_hand = 0.5 * torch.log(torch.tensor(0.5 / 0.4)) + 0.3 * torch.log(torch.tensor(0.3 / 0.4))
    found = same_policy._divergence(p.log(), q.log())  # of both, a rest of 0.1
    assert float(found[0]) == pytest.approx(float(by_hand), abs=1e-6)
    assert float(same_policy._divergence(p.log(), p.log())[0]) == 0.0


def read(best: list[int], logps: list[float] | None = None) -> Read:
    """What a policy makes of a reply of ``best`` tokens; ``logps`` are those of tokens 0, 1, …"""
    count, logps = len(best), logps or [-0.1]
    kept = torch.arange(len(logps)).expand(count, -1)
    logps_CK = torch.tensor(logps).double().expand(count, -1)
    written = torch.full((count,), max(logps)).double()
    return Read(kept, logps_CK, torch.tensor(best), written)


def test_a_token_at_a_tie_is_counted_apart_and_one_beyond_it_is_not() -> None:
    def of(second: float, instead: int) -> Agreement:
        logps = [-0.9, -0.9 - second, -3.0]
        return agreement([read([0, 0], logps)], [read([0, instead], logps)], [[0, 0]])

    tied = of(5e-5, instead=1)
    assert (tied.equal_tokens, tied.tied_tokens, tied.tied_replies) == (1, 1, 1)
    assert Proof("a test", True, tied, None).fault is None
    # The first two are a tie; the third of them is none, nor one that was not kept.
    for beyond in (of(2e-4, instead=1), of(5e-5, instead=2), of(5e-5, instead=77)):
        assert (beyond.equal_tokens, beyond.tied_tokens, beyond.equal_replies) == (1, 0, 0)
        assert "differ beyond a tie" in str(Proof("a test", True, beyond, None).fault)


@pytest.mark.parametrize(("difference", "is_fine"), [(0.9e-4, True), (1.1e-4, False)])
def test_float32_is_held_to_its_log_probabilities(difference: float, is_fine: bool) -> None:
    found = agreement([read([1], [-0.1])], [read([1], [-0.1 - difference])], [[1]])
    assert (Proof("a test", True, found, None).fault is None) == is_fine


@pytest.mark.parametrize(
    ("equal", "kl", "is_fine"),
    [(960, 0.01, True), (940, 0.01, False), (960, 0.03, False), (960, float("nan"), False)],
)
def test_fewer_bits_are_held_to_their_bounds(equal: int, kl: float, is_fine: bool) -> None:
    found = Agreement(10, 9, 0, 1000, equal, 0, 0.5, 0.01, kl)
    proof = Proof("a test", False, found, None)
    assert (proof.fault is None) == is_fine
    if not is_fine:
        with pytest.raises(ModelError, match="not the trained policy"):
            same_policy.refuse_other(proof)


def test_fewer_bits_that_answer_fewer_problems_right_are_refused() -> None:
    found = Agreement(20, 10, 0, 1000, 1000, 0, 0.1, 0.001, 1e-3)
    right = evaluation([GOOD] * 20)
    for wrong, is_fine in ((0, True), (1, True), (20, False)):
        answers = same_policy.paired(right, evaluation([WRONG] * wrong + [GOOD] * (20 - wrong)))
        proof = Proof("a test", False, found, answers)
        assert (proof.fault is None) == is_fine, wrong
    assert "fewer problems right" in str(proof.fault)
    # More right ones are no fault.
    answers = same_policy.paired(evaluation([WRONG] * 20), right)
    assert Proof("a test", False, found, answers).fault is None


@pytest.mark.parametrize(
    ("kl", "untrained", "is_fine"),
    [
        (4e-4, 1e-3, True),
        (5e-4, 1e-3, False),
        (1e-3, 1e-3, False),
        (1e-3, None, True),
        (0.0, 0.0, True),  # nothing was learned, and nothing was rounded
        (1e-9, 0.0, False),
        (1e-9, float("nan"), False),
    ],
)
def test_rounding_that_takes_half_of_what_was_learned_is_refused(
    kl: float, untrained: float | None, is_fine: bool
) -> None:
    found = Agreement(10, 10, 0, 1000, 1000, 0, 0.1, 0.001, kl)
    proof = Proof("a test", False, found, None, untrained)
    assert (proof.fault is None) == is_fine
    if not is_fine:
        with pytest.raises(ModelError, match="float32 or as an adapter"):
            same_policy.refuse_other(proof)


def test_mass_that_leaves_the_kept_tokens_counts_in_the_divergence() -> None:
    p = torch.tensor([[0.5, 0.3]]).double()  # the rest is 0.2
    for kept, rest in ((0.1, 0.4), (0.4, 0.1)):
        q = torch.tensor([[0.5, kept]]).double()
        wanted = 0.3 * math.log(0.3 / kept) + 0.2 * math.log(0.2 / rest)
        found = float(same_policy._divergence(p.log(), q.log())[0])
        assert found == pytest.approx(wanted)
