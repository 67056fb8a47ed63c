"""Are the recorded replies what these weights write, at these random numbers?

Every recorded token is judged where it stands: the model reads the prompt and the recorded tokens
before it, by transformers' own forward and not by our engine, and the token that its distribution
gives at the recorded uniform number (or the likeliest, for greedy replies) is compared with the
recorded one. A reply in which every token is the same is what a replay from the first token on
would have written. In a reply that differs in one token, the rest is judged too.

Rounding moves the boundaries of a distribution a little, so a token may differ where its number
lies within :data:`UNIFORM_TOLERANCE` of the recorded token's share, or where two scores tie to
:data:`SCORE_TOLERANCE`; such tokens are counted apart. For runs in narrower numbers than float32
the bound is :data:`NARROW_LOGPROB` in the log-probabilities instead.

Shapes: T tokens of a completion, V vocabulary entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from abacist.delivery.findings import Check
from abacist.errors import AbacistError
from abacist.policy.decoding.token_sampling import Sampling, cumulative, penalise_repetition
from abacist.policy.loading import Policy
from abacist.policy.scoring.teacher_forced import reply_logits, vocabulary_of
from abacist.records.rollout import Rollout, storable

UNIFORM_TOLERANCE = 1e-5
SCORE_TOLERANCE = 1e-4
NARROW_LOGPROB = 0.5


@dataclass(frozen=True)
class Reply:
    """A recorded reply to be replayed. ``uniforms`` are the numbers of its tokens; None: greedy."""

    file: str
    item: str
    recorded: Rollout
    uniforms: torch.Tensor | None


@dataclass
class Tally:
    """Counts over replayed replies and their tokens."""

    replies: int = 0
    same_replies: int = 0
    near_replies: int = 0
    wide_replies: int = 0  # with a token that passes by the bound of narrower numbers only
    tokens: int = 0
    same: int = 0
    near: int = 0
    wide: int = 0  # of those near, within the bound of narrower numbers only

    @property
    def sentence(self) -> str:
        """In words."""
        return f"{self.replies:,} replies replayed: {self.short}"

    @property
    def short(self) -> str:
        """The same without how many replies there were."""
        wrong = self.replies - self.same_replies - self.near_replies - self.wide_replies
        different = self.tokens - self.same - self.near
        if self.same == self.tokens and not wrong:
            return f"all {self.replies:,} token for token ({self.tokens:,} tokens)"
        return (
            f"{self.same_replies:,} equal token for token, {self.near_replies:,} equal except at "
            f"ties, "
            + (f"{self.wide_replies:,} within a wider bound, " if self.wide_replies else "")
            + f"{wrong:,} different ({self.tokens:,} tokens: "
            f"{self.same:,} the same, {self.near - self.wide:,} at a tie, "
            + (f"{self.wide:,} within the bound of narrower numbers, " if self.wide else "")
            + f"{different:,} different)"
        )


def replay(
    policy: Policy,
    replies: Sequence[Reply],
    sampling: Sampling | None,
    max_completion_tokens: int,
    check: Check,
    *,
    is_narrow: bool,
    progress: Callable[[int], None],
) -> Tally:
    """Judge every token of ``replies``; faults go to ``check``. ``progress`` gets tokens done."""
    tally = Tally()
    sound = []
    for reply in replies:
        tally.replies += 1
        try:
            ids = policy.chat.encode([dict(turn) for turn in reply.recorded.messages])
        except AbacistError as error:
            check.fault(reply.file, f"{reply.item}, prompt", "a prompt", error.message)
            continue
        if _is_sound(policy, reply, ids, max_completion_tokens, check):
            sound.append((reply, ids))
        tally.tokens += len(reply.recorded.completion_ids)
    rows = [(ids, list(reply.recorded.completion_ids)) for reply, ids in sound]
    for number, logits_TV in reply_logits(policy, rows, by_transformers=True):
        reply, ids = sound[number]
        gaps = _gaps(reply, ids, logits_TV, sampling)
        _judge(policy, reply, gaps, tally, check, is_narrow)
        progress(len(reply.recorded.completion_ids))
    return tally


def _is_sound(
    policy: Policy, reply: Reply, ids: list[int], budget_tokens: int, check: Check
) -> bool:
    """Whether a recorded reply is one at all: its ids, text, length and end fit together."""
    recorded, chat = reply.recorded, policy.chat
    written, before = list(recorded.completion_ids), check.num_faults

    def fault(what: str, claimed: object, found: object) -> None:
        check.fault(reply.file, f"{reply.item}, {what}", claimed, found)

    if len(ids) != recorded.prompt_tokens:
        fault("prompt_tokens", recorded.prompt_tokens, len(ids))
    if not all(0 <= index < vocabulary_of(policy) for index in written):
        fault("completion_ids", "tokens", "ids beyond the vocabulary")
        return False
    if len(written) != recorded.completion_tokens:
        fault("completion_tokens", recorded.completion_tokens, len(written))
    stops = [at for at, index in enumerate(written) if index in chat.stop_ids]
    if not written or len(ids) + len(written) > policy.context_tokens + 1:
        fault("completion_ids", "a completion", f"{len(written):,} tokens")
        return False
    if stops and stops[0] != len(written) - 1:
        fault("completion_ids", "a completion", f"tokens behind the stop token {stops[0] + 1}")
    if not stops and len(written) != budget_tokens:
        found = f"{len(written)} tokens without a stop token"
        fault("completion_ids", f"a stop token, or {budget_tokens} tokens", found)
    reason = chat.stop_reason(written, budget_tokens)
    if reason is not recorded.stop_reason:
        fault("stop_reason", recorded.stop_reason.value, reason.value)
    if (text := storable(chat.decode(written))) != recorded.completion:
        fault("completion", recorded.completion, text)
    return check.num_faults == before or len(ids) == recorded.prompt_tokens


@dataclass(frozen=True)
class _Gaps:
    """Per token: what the replay chooses, and how far the recorded one is from being chosen.

    ``beyond`` is 0 or less where the recorded token is within the tolerance of float32,
    ``beyond_wide`` where it is within the bound of narrower numbers.
    """

    chosen: list[int]
    beyond: list[float]
    beyond_wide: list[float]


def _gaps(
    reply: Reply, ids: list[int], logits_TV: torch.Tensor, sampling: Sampling | None
) -> _Gaps:
    recorded_T = torch.tensor(list(reply.recorded.completion_ids), device=logits_TV.device)
    if sampling is None or reply.uniforms is None:
        chosen_T = logits_TV.argmax(dim=-1)
        best_T = logits_TV.amax(dim=-1)
        gap_T = best_T - logits_TV.gather(1, recorded_T[:, None])[:, 0]
        wide_T = gap_T - 2 * NARROW_LOGPROB
        return _Gaps(chosen_T.tolist(), (gap_T - SCORE_TOLERANCE).tolist(), wide_T.tolist())
    if sampling.repetition_penalty != 1:
        logits_TV = _penalised(logits_TV, ids, recorded_T, sampling.repetition_penalty)
    cumulative_TV = cumulative(logits_TV, sampling)
    uniforms_T = reply.uniforms[: len(recorded_T)].to(cumulative_TV)
    cumulative_TV = cumulative_TV / cumulative_TV[:, -1:]
    eps = torch.finfo(cumulative_TV.dtype).eps
    below_one = uniforms_T.clamp(max=1 - eps)[:, None].contiguous()
    chosen_T = torch.searchsorted(cumulative_TV, below_one, right=True)[:, 0]
    high_T = cumulative_TV.gather(1, recorded_T[:, None])[:, 0]
    low_T = cumulative_TV.gather(1, (recorded_T - 1).clamp(min=0)[:, None])[:, 0]
    low_T = torch.where(recorded_T > 0, low_T, torch.zeros_like(low_T))
    beyond_T = torch.maximum(low_T - uniforms_T, uniforms_T - high_T) - UNIFORM_TOLERANCE
    # What the boundaries can be, at most, where every log-probability is off by the bound.
    factor = math.exp(NARROW_LOGPROB)
    low_T = torch.maximum(low_T / factor, 1 - (1 - low_T) * factor)
    high_T = torch.minimum(high_T * factor, 1 - (1 - high_T) / factor)
    wide_T = torch.maximum(low_T - uniforms_T, uniforms_T - high_T) - UNIFORM_TOLERANCE
    return _Gaps(chosen_T.tolist(), beyond_T.tolist(), wide_T.tolist())


def _penalised(
    logits_TV: torch.Tensor, ids: list[int], recorded_T: torch.Tensor, penalty: float
) -> torch.Tensor:
    seen_V = torch.zeros(logits_TV.shape[1], dtype=torch.bool, device=logits_TV.device)
    seen_V[ids] = True
    rows = []
    for row, token in zip(logits_TV, recorded_T.tolist(), strict=True):
        rows.append(penalise_repetition(row[None], seen_V[None], penalty)[0])
        seen_V[token] = True
    return torch.stack(rows)


def _judge(
    policy: Policy, reply: Reply, gaps: _Gaps, tally: Tally, check: Check, is_narrow: bool
) -> None:
    written = list(reply.recorded.completion_ids)
    different, near, wide = [], 0, 0
    for at, token in enumerate(written):
        if token == gaps.chosen[at]:
            tally.same += 1
        elif gaps.beyond[at] <= 0:
            near += 1
        elif is_narrow and gaps.beyond_wide[at] <= 0:
            near += 1
            wide += 1
        else:
            different.append(at)
    tally.near += near
    tally.wide += wide
    if different:
        at = different[0]
        more = f" and {len(different) - 1:,} later ones" if len(different) > 1 else ""
        check.fault(
            reply.file,
            f"{reply.item}, token {at + 1} of {len(written)}{more}",
            _token(policy, written[at]),
            _token(policy, gaps.chosen[at]),
        )
    elif wide:
        tally.wide_replies += 1
    elif near:
        tally.near_replies += 1
    else:
        tally.same_replies += 1


def _token(policy: Policy, index: int) -> str:
    return repr(str(policy.chat.tokenizer.decode([index])))
