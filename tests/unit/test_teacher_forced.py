"""One reading of given replies, by two forwards: each row is read as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abacist.policy.loading import Policy, load_policy
from abacist.policy.scoring import teacher_forced
from abacist.policy.scoring.teacher_forced import Row, reply_logits, vocabulary_of
from lookalikes import KINDS

Lookalike = Callable[[str], Path]


def rows_for(policy: Policy, count: int = 20) -> list[Row]:
    """Prompts that begin alike, of different lengths, with replies of any tokens and lengths."""
    draws = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 9, (count, 2), generator=draws).tolist()

    def some(size: int) -> list[int]:
        return torch.randint(3, vocabulary_of(policy), (size,), generator=draws).tolist()

    return [([5, 6, 7, *some(before)], some(after)) for before, after in sizes]


def alone(policy: Policy, row: Row) -> torch.Tensor:
    prompt, reply = row
    ids = torch.tensor([[*prompt, *reply]])
    with torch.no_grad():
        return policy.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_transformers", [False, True])
def test_each_token_is_predicted_as_if_its_row_were_alone(
    kind: str, by_transformers: bool, lookalike: Lookalike, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(lookalike(kind)), device="cpu", dtype="float32")
    rows = rows_for(policy)
    monkeypatch.setattr(teacher_forced, "_ROWS", 3)
    monkeypatch.setattr(teacher_forced, "_MOST_TOKENS", 40)  # several batches
    found = dict(reply_logits(policy, rows, by_transformers=by_transformers))
    assert sorted(found) == list(range(len(rows)))
    assert any(not reply for _, reply in rows)
    for number, row in enumerate(rows):
        assert found[number].shape == (len(row[1]), vocabulary_of(policy))
        if row[1]:
            torch.testing.assert_close(found[number], alone(policy, row), atol=1e-4, rtol=0)


def test_a_proof_about_our_engine_is_read_by_transformers_own_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = load_policy("tiny", device="cpu", dtype="float32")

    def ours(*args: object) -> None:
        raise AssertionError("our forward was taken")

    monkeypatch.setattr(teacher_forced, "completion_logits", ours)
    assert len(list(reply_logits(policy, rows_for(policy, 3), by_transformers=True))) == 3
    with pytest.raises(AssertionError, match="our forward was taken"):
        list(reply_logits(policy, rows_for(policy, 3)))


def test_a_batch_of_transformers_forward_is_bounded_in_tokens_and_in_logits() -> None:
    rows: list[Row] = [([1] * 10, [2] * size) for size in (1, 2, 3, 40, 50, 9000)]
    batches = list(teacher_forced._by_size(range(6), rows, vocabulary=2**20))
    assert batches == [[0, 1, 2], [3], [4], [5]]
    assert list(teacher_forced._by_size(range(5), rows, vocabulary=100)) == [[0, 1, 2, 3, 4]]
