"""From the ledger of an audit to its findings: paid and should not be, or the reverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from abacist.task.audit.findings import Finding, Kind
from abacist.task.audit.hacks import PLACES
from abacist.task.audit.ledger import EPSILON, Ledger, Row
from abacist.task.audit.renderings import ASKED, GROUPED, PLAIN_DIGITS, Role

SMALL = 0.02  # of the nominal maximum: differences below this are not worth a finding
_RIGHT_ONE = ", the right one "
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Bench:
    """What the findings are judged by: the ledger, and which rewards look at the answer."""

    ledger: Ledger
    names: Sequence[str]
    answer_rewards: frozenset[int]
    home: str
    wrong: str  # the row of honest attempts gone wrong
    is_whole: bool  # no reward had to be left out

    @property
    def honest(self) -> Row:
        return self.ledger.rows[self.ledger.honest]

    def without_answer(self, row: Row) -> float:
        """Its mean total, leaving out what is paid for the answer."""
        return row.mean - sum(row.reward_mean(number) for number in self.answer_rewards)

    @property
    def small(self) -> float:
        return SMALL * abs(self.ledger.nominal) + EPSILON


def findings(bench: Bench) -> Iterator[Finding]:
    """Everything that the ledger shows, the gravest first."""
    yield from _hackable(bench)
    yield from _nothing_for_the_answer(bench)
    yield from _never_paid(bench)
    yield from _maxima(bench)
    yield from _paid_without_work(bench)
    for number in sorted(bench.answer_rewards):
        yield from _answers(bench, number)
    for number in range(len(bench.names)):
        if number not in bench.answer_rewards:
            yield from _integers(bench, number)


def _hackable(bench: Bench) -> Iterator[Finding]:
    if not bench.answer_rewards and not bench.is_whole:
        return  # what was left out may well pay for the answer
    honest = f"the honest right solution {bench.honest.mean:.2f}"
    rows = bench.ledger.of(Role.BLIND, Role.LIST)
    better = [row for row in rows if row.is_better]
    if better:
        best = better[0]
        yield Finding.of(Kind.HACKABLE, f"“{best.name}” earns {best.mean:.2f} on average, {honest}")
        return
    if not bench.answer_rewards:
        return
    free = next((row for row in rows if row.role is Role.BLIND and row.is_as_good), None)
    if free:
        yield Finding.of(
            Kind.HACKABLE,
            f"“{free.name}” earns {free.mean:.2f} without knowing the answer, {honest}",
        )
        return
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row.role is Role.LIST:
            families.setdefault(row.name.partition(_RIGHT_ONE)[0], []).append(row)
    for name, members in families.items():
        if all(row.is_as_good for row in members):
            yield Finding.of(
                Kind.HACKABLE,
                f"“{name}” earn {members[0].mean:.2f} wherever the right one stands, {honest}",
            )
            return


def _nothing_for_the_answer(bench: Bench) -> Iterator[Finding]:
    if bench.is_whole and not bench.answer_rewards:
        wrong = bench.ledger.rows[bench.wrong]
        yield Finding.of(
            Kind.NOTHING_FOR_THE_ANSWER,
            f"right solutions earn {bench.honest.mean:.2f} on average, wrong ones {wrong.mean:.2f}",
        )


def _never_paid(bench: Bench) -> Iterator[Finding]:
    ledger = bench.ledger
    for number, name in enumerate(bench.names):
        if ledger.most[number] - ledger.least[number] <= EPSILON:
            yield Finding.of(
                Kind.NEVER_PAID,
                f"it gave {ledger.most[number]:g} to each of {ledger.num_replies:,} replies",
                name,
            )
        elif ledger.most[number] > 0 and bench.honest.num_paid[number] == 0:
            paid = [row for row in ledger.rows.values() if _is_paid(row, number)]
            seen = "; it was paid for " + ", ".join(f"“{row.name}”" for row in paid[:2])
            yield Finding.of(
                Kind.UNPAID_LAYOUT,
                f"on none of {bench.honest.num_replies:,} right solutions “{bench.honest.name}”, "
                f"without a final newline, as chat models end{seen if paid else ''}",
                name,
            )


def _is_paid(row: Row, number: int) -> bool:
    return 2 * row.num_paid[number] > row.num_replies


def _maxima(bench: Bench) -> Iterator[Finding]:
    ledger = bench.ledger
    rows = ledger.rows.values()
    payable = [
        number for number in range(len(bench.names)) if any(_is_paid(row, number) for row in rows)
    ]
    for first, second in combinations(payable, 2):
        if not any(_is_paid(row, first) and _is_paid(row, second) for row in rows):
            yield Finding.of(
                Kind.EXCLUSION,
                f"no kind of reply, of {len(rows)}, is paid by both",
                bench.names[first],
                bench.names[second],
            )
    if ledger.nominal - ledger.most_total > bench.small:
        yield Finding.of(
            Kind.UNREACHABLE,
            f"{ledger.nominal:g} nominal, {ledger.most_total:g} is the most that a reply earned",
        )
    if ledger.most_total - bench.honest.mean > bench.small:
        others = ledger.of(Role.LAYOUT)
        said = ", ".join(
            f"{row.mean:.2f} “{row.name}”" for row in others if row is not bench.honest
        )
        yield Finding.of(
            Kind.HONEST_BELOW_MOST,
            f"{bench.honest.mean:.2f} on average of the {ledger.most_total:g} that a reply can "
            f"earn; in other layouts {said}",
        )


def _paid_without_work(bench: Bench) -> Iterator[Finding]:
    ledger, wrong = bench.ledger, bench.ledger.rows[bench.wrong]
    blind = sorted(ledger.of(Role.BLIND), key=lambda row: -bench.without_answer(row))
    most, honest = bench.without_answer(blind[0]), bench.without_answer(wrong)
    if most - honest > bench.small:
        yield Finding.of(
            Kind.WRONG_HACK,
            f"“{blind[0].name}” earns {most:.2f}, a worked solution with a wrong result "
            f"{honest:.2f}",
        )
    best = next((row for row in ledger.of(Role.WORKLESS) if row.is_better), None)
    if best and best.advantage > bench.small:
        yield Finding.of(
            Kind.WORKLESS,
            f"“{best.name}” earns {best.mean:.2f}, the worked solution {bench.honest.mean:.2f}",
        )
    bare = ledger.rows.get("the bare answer")
    paying = [number for number in bench.answer_rewards if bare and _is_paid(bare, number)]
    if bare and paying and bench.home == ASKED:
        example = bare.paid_answers[paying[0]][0]
        yield Finding.of(
            Kind.TAGLESS,
            f"a bare {example}, without any tag, earns {bare.mean:.2f}",
            *(bench.names[number] for number in paying),
        )


def _answers(bench: Bench, number: int) -> Iterator[Finding]:
    """What an answer reward should have paid and did not, and the reverse."""
    ledger, name = bench.ledger, bench.names[number]
    right = [Role.SAME_VALUE, *([Role.LAYOUT] if bench.home == ASKED else [])]
    missed = [
        _counted(row, row.num_replies - row.num_paid[number], row.unpaid_answers[number])
        for row in [bench.honest, *ledger.of(*right)]
        if row.num_paid[number] < row.num_replies
    ]
    if missed:
        yield Finding.of(Kind.FALSE_NEGATIVE, _listed(list(dict.fromkeys(missed))), name)
    wrong = [bench.ledger.rows[bench.wrong], *ledger.of(Role.OTHER_VALUE, Role.NO_NUMBER)]
    paid = [
        _counted(row, row.num_paid[number], row.paid_answers[number])
        for row in wrong
        if row.num_paid[number]
    ]
    if paid:
        yield Finding.of(Kind.FALSE_POSITIVE, _listed(paid), name)
    places: dict[str, list[str]] = {}
    for row in ledger.of(Role.LIST):
        if _is_paid(row, number):
            family, _, place = row.name.partition(_RIGHT_ONE)
            places.setdefault(family, []).append(place)
    said = [
        f"{family}, {'wherever it stands' if len(where) == len(PLACES) else ' or '.join(where)}"
        for family, where in places.items()
    ]
    said += [row.name for row in ledger.of(Role.BLIND) if _is_paid(row, number)]
    if said:
        yield Finding.of(Kind.LISTED, "; ".join(said), name)


def _integers(bench: Bench, number: int) -> Iterator[Finding]:
    """For a reward that pays for plain numbers: does it know one when it sees one?"""
    rows, name = bench.ledger.rows, bench.names[number]
    plain = rows.get(PLAIN_DIGITS)
    if plain is None or not _is_paid(plain, number) or rows["words"].num_paid[number]:
        return
    missed = [
        _counted(row, row.num_replies - row.num_paid[number], row.unpaid_answers[number])
        for row in (plain, rows.get(GROUPED))
        if row and row.num_paid[number] < row.num_replies
    ]
    if missed:
        yield Finding.of(Kind.MISSED_INTEGER, _listed(missed), name)
    taken = [
        _counted(row, row.num_paid[number], row.paid_answers[number])
        for row in bench.ledger.of(Role.NO_NUMBER)
        if row.num_paid[number]
    ]
    if taken:
        yield Finding.of(Kind.NOT_A_NUMBER, _listed(taken), name)


def _counted(row: Row, count: int, answers: Sequence[str]) -> str:
    shown = [" ".join(answer.split()) for answer in answers[:1] if answer.strip()]
    if count < row.num_replies:
        shown.append(f"{count:,} of {row.num_replies:,}")
    return f"{row.name} ({'; '.join(shown)})" if shown else row.name


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _MAX_SHOWN
    return "; ".join(items[:_MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
