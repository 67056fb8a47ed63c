"""The progress of a generation, counted in tokens.

Counting replies that have ended would mislead, because short ones end first. The number of tokens
written is known at every moment, so progress and remaining time are estimated in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Decoded:
    """The replies of a generation: ended, open (in work), and waiting.

    ``open_tokens`` is the sum over the open replies, ``oldest_tokens`` the length of the longest of
    them. A reply may count as open for a few tokens past its end.
    """

    replies: int
    ended: int
    ended_tokens: int
    open: int
    open_tokens: int
    oldest_tokens: int
    budget_tokens: int

    @classmethod
    def all_ended(cls, lengths_tokens: Sequence[int], budget_tokens: int) -> Decoded:
        """Replies of these lengths, all ended."""
        count = len(lengths_tokens)
        return cls(count, count, sum(lengths_tokens), 0, 0, 0, budget_tokens)

    @property
    def written_tokens(self) -> int:
        """Tokens of all replies so far."""
        return self.ended_tokens + self.open_tokens

    @property
    def expected_tokens(self) -> float:
        """The estimated number of tokens of all replies at their end.

        The mean length is estimated as tokens written, open replies included, divided by replies
        ended. An open reply is expected to write that many more tokens. No reply is estimated
        longer than the budget. Until one has ended, each is assumed to use the whole budget.

        >>> Decoded(4, 0, 0, 4, 40, 10, 100).expected_tokens
        400.0
        >>> Decoded(4, 2, 15, 2, 25, 15, 100).expected_tokens  # 40 tokens, 2 ends: 20 more each
        80.0
        """
        mean = float(self.budget_tokens)
        if self.ended:
            mean = min(mean, self.written_tokens / self.ended)
        waiting = self.replies - self.ended - self.open
        to_come = waiting * mean
        if self.open:
            room = self.budget_tokens - self.open_tokens / self.open
            to_come += self.open * max(0.0, min(mean, room))
        return self.written_tokens + to_come

    def words(self) -> str:
        """``"12 of 32 replies, token 87 of at most 160"``."""
        done = f"{self.ended:,} of {self.replies:,} replies"
        if not self.open:
            return done
        return f"{done}, token {self.oldest_tokens:,} of at most {self.budget_tokens:,}"

    def after(self, earlier: Decoded) -> Decoded:
        """This progress counted on from ``earlier``, an ended first part of the same work."""
        return replace(
            self,
            replies=earlier.replies + self.replies,
            ended=earlier.ended + self.ended,
            ended_tokens=earlier.ended_tokens + self.ended_tokens,
        )

    def before(self, replies: int) -> Decoded:
        """This progress as a first part of some work, with ``replies`` more to follow."""
        return replace(self, replies=self.replies + replies)


Progress = Callable[[Decoded], None]
"""Called with the progress after every token, where it is known; must be quick."""
