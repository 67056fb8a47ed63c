"""How far a generation is, counted in tokens.

Replies that have ended tell little about those that have not: short ones end first. What is
known at every moment is how many tokens have been written and by whom, so progress and the time
that is left are reckoned in tokens of replies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Decoded:
    """The replies of a generation: those that have ended, those in work, those that wait.

    ``open_tokens`` is what the replies in work hold together, ``oldest_tokens`` what the first of
    them holds. A reply may count as open for a few tokens behind its end.
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
        """Replies of these lengths, none of them in work."""
        count = len(lengths_tokens)
        return cls(count, count, sum(lengths_tokens), 0, 0, 0, budget_tokens)

    @property
    def written_tokens(self) -> int:
        """Tokens of all replies so far."""
        return self.ended_tokens + self.open_tokens

    @property
    def expected_tokens(self) -> float:
        """Tokens of all replies at their end, as far as can be told now; at most the budget's.

        A reply is expected to end as often a token as all replies did so far, those in work
        included: tokens written by replies ended. Until one has ended, all are as long as allowed.

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
        """The same as a later part of one piece of work, whose ``earlier`` part has ended."""
        return replace(
            self,
            replies=earlier.replies + self.replies,
            ended=earlier.ended + self.ended,
            ended_tokens=earlier.ended_tokens + self.ended_tokens,
        )

    def before(self, replies: int) -> Decoded:
        """The same as an earlier part of one piece of work: so many ``replies`` are to follow."""
        return replace(self, replies=self.replies + replies)


Progress = Callable[[Decoded], None]
"""Told how far a generation is, after every token where that is known: it must be quick."""
