"""Is what was exported the policy that was trained? Both are asked, and every token is compared.

The trained policy answers problems that were held out, greedily. What was exported is loaded again
from its files and

* answers the same problems: which replies are the same, token for token, and how many are right;
* reads the trained policy's replies: at every token, which one it would have written, its
  log-probability of the one that was, and the distance of the two distributions
  (Kullback-Leibler divergence of the trained policy from the exported one, in nats).

Both are computed in float32 on the same machine, so what differs is what the files hold. A
distribution is kept as its :data:`KEPT_TOKENS` most likely tokens and the rest as one. A divergence
computed on that is never larger than the true one; what it misses is the weight of the rest times
the divergence of the two distributions within the rest.

Shapes: C tokens of a reply, K kept tokens, V vocabulary entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from abacist.errors import ModelError
from abacist.policy.loading import Policy
from abacist.policy.scoring.teacher_forced import reply_logits
from abacist.proof.comparison.compare import Comparison, compare
from abacist.proof.evaluation import Evaluation

KEPT_TOKENS = 64
TIE = 1e-4
"""Two tokens whose log-probabilities in the trained policy differ by less are a tie: either is the
greedy one."""

# Bounds. Of float32 files:
LOGP_BOUND = 1e-4
# Of files in fewer bits:
EQUAL_BOUND = 0.95
KL_BOUND = 0.02
TRAINING_BOUND = 0.5
"""Rounding may move the policy by less than this share of the divergence that training made."""


@dataclass(frozen=True)
class Read:
    """What a model makes of one reply: for each of its C tokens the K most likely tokens of the
    trained policy, the most likely first, with their log-probabilities in this model; the token
    that is likeliest in this model; and the log-probability of the token that stands there."""

    kept_CK: Tensor
    logps_CK: Tensor
    best_C: Tensor
    written_C: Tensor


@dataclass(frozen=True)
class Agreement:
    """How far two policies agree on the trained policy's replies; divergences are in nats."""

    replies: int
    equal_replies: int
    tied_replies: int
    tokens: int
    equal_tokens: int
    tied_tokens: int
    largest_logp_difference: float
    mean_logp_difference: float
    kl_a_token: float

    @property
    def equal_share(self) -> float:
        """The share of tokens that both would have written, ties included."""
        return (self.equal_tokens + self.tied_tokens) / self.tokens if self.tokens else math.nan

    def to_json(self) -> dict[str, Any]:
        """The counts and figures as an object."""
        return {**asdict(self), "equal_share": self.equal_share}

    def sentence(self) -> str:
        """In words, for a person."""
        tied = f", {self.tied_tokens:,} more at ties" if self.tied_tokens else ""
        return (
            f"{self.equal_replies + self.tied_replies:,} of {self.replies:,} greedy replies equal; "
            f"{self.equal_tokens:,} of {self.tokens:,} tokens equal{tied}; log-probabilities "
            f"differ by {self.largest_logp_difference:.1e} at most, "
            f"{self.mean_logp_difference:.1e} on average; KL {self.kl_a_token:.1e} a token"
        )


def read_replies(
    policy: Policy,
    replies: Evaluation,
    tell: Callable[[int, int], None],
    kept: Sequence[Read] | None = None,
) -> list[Read]:
    """What ``policy`` makes of the greedy ``replies``, one after another.

    ``kept`` is what the trained policy made of them: its most likely tokens are looked at. Without
    it they are those of ``policy``. ``tell`` hears how many replies of how many are read.
    """
    rows = rows_of(policy, replies)
    found: dict[int, Read] = {}
    for number, logits_CV in reply_logits(policy, rows):
        # On the CPU, since not every device has float64.
        logps_CV = torch.log_softmax(logits_CV.cpu().double(), dim=-1)
        if kept is None:
            kept_CK = logps_CV.topk(min(KEPT_TOKENS, logps_CV.shape[-1])).indices
        else:
            kept_CK = kept[number].kept_CK
        written = torch.tensor(rows[number][1], dtype=torch.long)[:, None]
        found[number] = Read(
            kept_CK,
            logps_CV.gather(1, kept_CK),
            logps_CV.argmax(dim=-1),
            logps_CV.gather(1, written)[:, 0],
        )
        tell(len(found), len(rows))
    return [found[number] for number in range(len(rows))]


def rows_of(policy: Policy, replies: Evaluation) -> list[tuple[list[int], list[int]]]:
    """The token ids of each prompt and of the reply to it."""
    return [
        (policy.chat.encode(reply.messages), list(reply.completion_ids))
        for reply in replies.rollouts
    ]


def agreement(
    trained: Sequence[Read], exported: Sequence[Read], written: Sequence[Sequence[int]]
) -> Agreement:
    """Compare what two policies make of the trained one's ``written`` replies, by token ids."""
    equal_replies = tied_replies = tokens = equal_tokens = tied_tokens = 0
    differences: list[Tensor] = []
    divergence = 0.0
    for one, other, ids in zip(trained, exported, written, strict=True):
        same_C = other.best_C == torch.tensor(ids)
        tied_C = ~same_C & _is_tied(one, other.best_C)
        tokens += len(ids)
        equal_tokens += int(same_C.sum())
        tied_tokens += int(tied_C.sum())
        equal_replies += bool(same_C.all())
        tied_replies += bool((same_C | tied_C).all()) and not bool(same_C.all())
        differences.append((one.written_C - other.written_C).abs())
        divergence += float(_divergence(one.logps_CK, other.logps_CK).sum())
    all_differences = torch.cat(differences) if differences else torch.zeros(0)
    return Agreement(
        replies=len(written),
        equal_replies=equal_replies,
        tied_replies=tied_replies,
        tokens=tokens,
        equal_tokens=equal_tokens,
        tied_tokens=tied_tokens,
        largest_logp_difference=float(all_differences.max()) if tokens else math.nan,
        mean_logp_difference=float(all_differences.mean()) if tokens else math.nan,
        kl_a_token=divergence / tokens if tokens else math.nan,
    )


def _is_tied(trained: Read, token_C: Tensor) -> Tensor:
    """Whether each token is within a tie of the trained policy's most likely one, [C]."""
    is_it_CK = trained.kept_CK == token_C[:, None]
    near_CK = trained.logps_CK.max(dim=1, keepdim=True).values - trained.logps_CK < TIE
    return (is_it_CK & near_CK).any(dim=1)


def _divergence(trained_CK: Tensor, exported_CK: Tensor) -> Tensor:
    """KL [C] of two distributions, of each its kept tokens and the rest as one."""
    p, q = trained_CK.exp(), exported_CK.exp()
    kept = (p * (trained_CK - exported_CK)).sum(-1)
    p_rest = (1 - p.sum(-1)).clamp_min(0)
    q_rest = (1 - q.sum(-1)).clamp_min(1e-12)
    rest = torch.where(p_rest > 1e-12, p_rest * (p_rest.clamp_min(1e-12) / q_rest).log(), 0.0)
    return (kept + rest).clamp_min(0)


@dataclass(frozen=True)
class Proof:
    """What was found of one artefact, loaded by one ``reader``.

    llama.cpp computes what it loads itself. What transformers or PEFT loads is computed by the
    forward that computed the trained policy (``policy.scoring`` where it knows the family).

    ``untrained_kl`` is the divergence of the policy before training, where there is one to ask: how
    much training changed, to see how little of that rounding took away.
    """

    reader: str
    is_exact: bool
    agreement: Agreement
    answers: Comparison | None
    untrained_kl: float | None = None

    @property
    def fault(self) -> str | None:
        """Which bound the artefact is beyond; None if it is the trained policy."""
        found = self.agreement
        if self.is_exact:
            different = found.replies - found.equal_replies - found.tied_replies
            if different:
                return f"{different} of {found.replies} greedy replies differ beyond a tie"
            if not found.largest_logp_difference <= LOGP_BOUND:
                return (
                    f"a log-probability differs by {found.largest_logp_difference:.1e}, more than "
                    f"{LOGP_BOUND:.0e}"
                )
            return None
        if not found.equal_share >= EQUAL_BOUND:
            return (
                f"only {100 * found.equal_share:.2f} % of the tokens are equal; at least "
                f"{EQUAL_BOUND:.0%} must be"
            )
        if not found.kl_a_token <= KL_BOUND:
            return f"the divergence is {found.kl_a_token:.1e} a token, more than {KL_BOUND:g}"
        if (reason := self._lost_training()) is not None:
            return reason
        if self.answers is not None and self.answers.accuracy.is_worse:
            return "it answers fewer problems right than the trained policy, by the paired test"
        return None

    def _lost_training(self) -> str | None:
        """Whether the artefact is as far from the trained policy as its base is, or half as far."""
        moved, trained = self.agreement.kl_a_token, self.untrained_kl
        if trained is None or moved == 0 or moved < trained * TRAINING_BOUND:
            return None
        return (
            f"rounding moved the policy by a KL of {moved:.1e} a token, and training by "
            f"{trained:.1e}: about as far, so little of what was learned would be left. A run that "
            "learned this little is exported in float32 or as an adapter only"
        )

    def to_json(self) -> dict[str, Any]:
        """Figures, paired test and bounds as an object."""
        return {
            "reader": self.reader,
            "bounds": bounds(self.is_exact),
            "fault": self.fault,
            "agreement": self.agreement.to_json(),
            "accuracy": self.answers and self.answers.accuracy.to_json(),
            "untrained_kl_a_token": self.untrained_kl,
        }


def bounds(is_exact: bool) -> dict[str, float]:
    """What an artefact must keep, by name."""
    if is_exact:
        return {"equal_replies": 1.0, "tie": TIE, "largest_logp_difference": LOGP_BOUND}
    return {
        "equal_tokens": EQUAL_BOUND,
        "kl_a_token": KL_BOUND,
        "share_of_untrained_kl": TRAINING_BOUND,
    }


def paired(trained: Evaluation, exported: Evaluation) -> Comparison:
    """Accuracy on the same problems, paired; conditions may differ in what the model is called."""
    return compare(trained, exported)


def refuse_other(proof: Proof) -> None:
    """Raise ModelError if what was exported is not the trained policy."""
    if proof.fault is not None:
        raise ModelError(
            f"The export is not the trained policy, loaded by {proof.reader}: {proof.fault}. "
            f"{proof.agreement.sentence()}.",
            "Nothing was kept. "
            + (
                "Nothing was rounded, so this is a fault of Abacist: please report it."
                if proof.is_exact
                else "Take a wider --dtype (float32 rounds nothing), or --to adapter."
            ),
        )
