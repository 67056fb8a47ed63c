"""The attention kernel is plain attention over a tree, forward and backward, to the last bit twice.

The reference is written from the definition: all scores at once in float64, a mask that says who
is whose ancestor, a softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abacist.policy.choices import Choice
from abacist.policy.kernels import build
from abacist.policy.kernels import tree_attention as kernel
from abacist.policy.scoring.attention_backend import AttentionBackend, padded_attention
from abacist.policy.scoring.packing import pack

pytestmark = pytest.mark.skipif(
    build.library() is None, reason=f"no kernels here: {build.unsupported_reason()}"
)

Branches = list[tuple[int, int, int]]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(build, "_WORTH_A_THREAD", 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """Branches (first token, tokens, parent), and what they are attended with."""

    branches: Branches
    heads: int
    key_heads: int
    size: int
    spread: float = 1.0

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        total = sum(tokens for _, tokens, _ in self.branches)

        def states(heads: int) -> Tensor:
            # As a linear layer gives them: a token's heads next to each other.
            drawn = torch.randn(1, total, heads, self.size, generator=draw)
            return (drawn * self.spread).transpose(1, 2)

        self.states = states(self.heads), states(self.key_heads), states(self.key_heads)
        self.grad = torch.randn(1, total, self.heads, self.size, generator=draw)
        self.scale = self.size**-0.5

    def by_kernel(self) -> list[Tensor]:
        table = torch.tensor(self.branches)
        return self.learned(lambda q, k, v: kernel.attend(q, k, v, table, self.scale))

    def by_definition(self) -> list[Tensor]:
        return self.learned(self.dense, torch.float64)

    def learned(self, attend: object, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The output, then the gradients of queries, keys and values."""
        states = [x.detach().to(dtype).requires_grad_() for x in self.states]
        out = attend(*states)  # type: ignore[operator]
        out.backward(self.grad.to(dtype))
        return [out.detach(), *(x.grad for x in states if x.grad is not None)]

    def dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        total = query.shape[2]
        sees = torch.zeros(total, total, dtype=torch.bool)
        for start, tokens, parent in self.branches:
            rows = slice(start, start + tokens)
            sees[rows, rows] = torch.ones(tokens, tokens).tril().bool()
            while parent >= 0:
                first, many, parent = self.branches[parent]
                sees[rows, first : first + many] = True
        repeats = self.heads // self.key_heads
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = (query @ key.mT * self.scale).masked_fill(~sees, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    branches: Branches = []
    for number in range(draw(st.integers(1, 7))):
        start = sum(tokens for _, tokens, _ in branches)
        long = st.sampled_from([1, 2, 15, 16, 17, 48, 129, 150])
        tokens = draw(st.one_of(st.integers(1, 40), long))
        branches.append((start, tokens, draw(st.integers(-1, number - 1))))
    key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    size = draw(st.sampled_from([1, 3, 8, 16, 20, 32, 33, 48, 64, 80, 128]))
    return Case(branches, key_heads * group, key_heads, size)


def assert_near(found: list[Tensor], expected: list[Tensor], relative: float = 2e-6) -> None:
    # A gradient may be nothing but what is left of larger terms: with a single key, zero.
    largest = max(float(exact.abs().max()) for exact in expected)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.shape == exact.shape
        assert float((mine - exact).abs().max()) <= relative * largest


@given(cases())
def test_outputs_and_gradients_are_those_of_plain_attention(case: Case) -> None:
    assert_near(case.by_kernel(), case.by_definition())


FORK = [(0, 70, -1), (70, 130, 0), (200, 9, 0), (209, 60, 1), (269, 55, 1), (324, 1, 2)]


@pytest.mark.parametrize("spread", [6.0, 30.0])  # scores to some +-100, and to some +-3000
def test_extreme_scores_neither_overflow_nor_vanish(spread: float) -> None:
    case = Case(FORK, heads=6, key_heads=2, size=32, spread=spread)
    found, exact = case.by_kernel(), case.by_definition()
    assert all(x.isfinite().all() for x in found)
    # A score of 3000 is known to 2e-4 in float32, and so is its weight.
    assert_near(found, exact, relative=1e-5 if spread < 10 else 5e-3)


def test_scores_of_plus_and_minus_80_are_weighed_exactly() -> None:
    case = Case([(0, 4, -1)], heads=1, key_heads=1, size=1)
    case.scale = 1.0
    query, key, value = (x.zero_() for x in case.states)
    query[:] = 1
    key[0, 0, :, 0] = torch.tensor([-80.0, 80.0, 80.0, -80.0])
    value[0, 0, :, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    out = case.by_kernel()[0]
    assert torch.allclose(out.flatten(), torch.tensor([1.0, 2.0, 3.0, 3.0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("which", "bad"),  # an infinite key may well have no weight
    [(0, torch.nan), (1, torch.nan), (2, torch.nan), (0, torch.inf), (2, torch.inf)],
)
def test_what_is_not_a_number_does_not_become_one(which: int, bad: float) -> None:
    case = Case(FORK, heads=4, key_heads=2, size=32)
    case.states[which][0, 0, 100, 5] = bad
    out, *grads = case.by_kernel()
    first_head = out[0, 100, 0]
    assert not (first_head if which < 2 else first_head[5]).isfinite().any()
    assert not all(grad.isfinite().all() for grad in grads)
    # A later token of the same branch sees that key; a token of another branch does not.
    assert out[0, 180, 0].isfinite().all() == (which == 0)
    assert out[0, 205].isfinite().all() and out[0, 180, 3].isfinite().all()


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(6, 2, 32), (3, 3, 20), (10, 5, 64)])
def test_a_second_thread_changes_no_bit(
    heads: int, key_heads: int, size: int, two_threads: None
) -> None:
    case = Case(FORK, heads, key_heads, size)
    twice = [case.by_kernel(), case.by_kernel()]
    torch.set_num_threads(1)
    twice.append(case.by_kernel())
    for found in twice[1:]:
        assert all(torch.equal(a, b) for a, b in zip(twice[0], found, strict=True))


def test_memory_in_any_order_is_taken() -> None:
    case = Case(FORK, heads=6, key_heads=2, size=32)
    expected = case.by_kernel()
    for order in ((0, 1, 2, 3), (0, 3, 1, 2), (0, 1, 3, 2)):
        back = sorted(range(4), key=order.__getitem__)
        case.states = tuple(  # type: ignore[assignment]
            x.permute(order).contiguous().permute(back) for x in case.states
        )
        assert all(torch.equal(a, b) for a, b in zip(case.by_kernel(), expected, strict=True))
    # A gradient that is one number everywhere, as a sum's is, has no memory of its own.
    case.grad = torch.ones(1, 1, 1, 1).expand(case.grad.shape)
    assert_near(case.by_kernel(), case.by_definition())


def test_a_recomputed_forward_gives_the_same_gradients() -> None:
    case, table = Case(FORK, heads=6, key_heads=2, size=32), torch.tensor(FORK)

    def again(*states: Tensor) -> Tensor:
        attend = kernel.attend
        return checkpoint(attend, *states, table, case.scale, use_reentrant=False)

    for mine, plain in zip(case.learned(again), case.by_kernel(), strict=True):
        assert torch.equal(mine, plain)


def batch(prompts: list[list[int]], completions: int) -> tuple[Tensor, Tensor, int]:
    """Each prompt with so many completions of other lengths, padded as TRL pads."""
    draw = torch.Generator().manual_seed(1)
    left, right = max(map(len, prompts)), 30
    ids = torch.randint(100, 200, (len(prompts) * completions, left + right), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        prompt = prompts[row // completions]
        mask[row, : left - len(prompt)] = 0
        ids[row, left - len(prompt) : left] = torch.tensor(prompt)
        mask[row, left + 1 + row * 7 % right :] = 0
    return ids, mask, right


COMMON = list(range(70))
BATCHES = {
    "one prompt": batch([COMMON], 4),
    "two prompts": batch([COMMON[:9], COMMON[20:50]], 3),
    "a common opening": batch([[*COMMON, 1], [*COMMON, 2, 3], [*COMMON, 4]], 3),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("skips", [False, True])
def test_a_packed_batch_is_attended_as_by_pytorch(name: str, skips: bool) -> None:
    ids, mask, width = BATCHES[name]
    skip = (torch.arange(len(ids)) % 3 == 0) if skips else None
    packing = pack(ids, mask, width, skip)
    assert packing is not None
    branches = [(start, tokens, parent) for start, tokens, parent in packing.branches.tolist()]
    case = Case(branches, heads=6, key_heads=2, size=32)
    assert case.grad.shape[1] == len(packing.token_ids)
    attend = AttentionBackend(None, Choice("scoring", "", "")).on(packing)
    mine = case.learned(lambda q, k, v: attend(q, k, v, case.scale))
    theirs = case.learned(lambda q, k, v: padded_attention(packing, q, k, v, case.scale))
    assert_near(mine, theirs, relative=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(mine, case.by_kernel(), strict=True))
    with torch.no_grad():
        assert torch.equal(attend(*case.states, case.scale), mine[0])


def test_only_float32_on_a_cpu_without_autocast_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.zeros(3, 1, 2, 4, 8)
    assert kernel.supports(*states)
    assert not kernel.supports(*states.bfloat16())
    assert not kernel.supports(*states.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernel.supports(*states)
    monkeypatch.setattr(build, "library", lambda: None)
    assert not kernel.supports(*states)
