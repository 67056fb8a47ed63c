"""No process waits for one that has ended, and it is said which has, and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from abacist.errors import AbacistError, DataError, Interrupted, ProcessLost
from abacist.learning import peers, processes
from abacist.learning.peers import Peers
from abacist.records.lock import identity
from imported import Imported


@pytest.fixture(params=["alive", "gone"])
def other(request: pytest.FixtureRequest) -> int:
    """The process id of another process."""
    if request.param == "alive":
        return os.getppid()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def two(other: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Peers, Peers]:
    """Rank 0, which is this process, and rank 1, which is another one."""
    monkeypatch.setattr(peers, "TELL_SECONDS", 0.1)
    store = dist.HashStore()
    ranks = Peers(store, 0, 2), Peers(store, 1, 2)
    started = {"started": identity(other)["started"] or "x"}
    store.set("owner/1", json.dumps(json.loads(store.get("owner/1")) | identity(other) | started))
    for one, its_peer in zip(ranks, (1, 0), strict=True):
        one._owners[its_peer] = json.loads(store.get(f"owner/{its_peer}"))
    return ranks


def test_a_process_that_is_gone_is_seen_and_said_by_those_that_are_left(
    other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, _ = two(other, monkeypatch)
    main.hint = "Go on with: abacist train --resume runs/r"
    cut_off = main.ended_by(RuntimeError("[gloo/tcp/pair.cc:1] Connection closed by peer [::1]:1"))
    assert isinstance(cut_off, ProcessLost)
    if other == os.getppid():
        assert f"rank 1 (process {other} on " in cut_off.message  # who else?
        assert "no longer answers (" in cut_off.message and "Connection closed" in cut_off.message
    else:
        assert f"rank 0 cannot go on: rank 1 (process {other}" in cut_off.message
        stop = main.ended_by(Interrupted("stopped by SIGTERM", "", 15))  # by the launcher, then
        assert isinstance(stop, ProcessLost)
    assert cut_off.hint == main.hint


@pytest.mark.parametrize("other", ["alive"], indirect=True)
class TestOfLivingProcesses:
    def test_what_one_found_wrong_is_said_by_the_main_one_with_its_rank(
        self, other: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main, one = two(other, monkeypatch)
        fault = DataError("row 3 has no answer", "Mend it.")
        assert one.ended_by(fault) is fault and fault.is_told
        said = main.ended_by(RuntimeError("gloo: Connection reset by peer"))
        assert isinstance(said, AbacistError) and said.exit_code == 1
        assert (said.message, said.hint) == ("rank 1: row 3 has no answer", "Mend it.")

    def test_what_all_find_wrong_each_says_for_itself(
        self, other: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main, one = two(other, monkeypatch)
        faults = DataError("no rows"), DataError("no rows")
        assert [one.ended_by(faults[0]), main.ended_by(faults[1])] == list(faults)

    def test_the_end_of_one_that_is_through_is_no_loss(
        self, other: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main, one = two(other, monkeypatch)
        one.done()
        assert main.look() is None

    def test_one_on_another_machine_that_is_silent_too_long_is_lost(
        self, other: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main, one = two(other, monkeypatch)
        # By its process id it would have ended, and machines may share a name.
        main._owners[1] |= {"sees": "elsewhere", "pid": 2**22 + 1}
        clock = [0.0]
        monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
        for clock[0] in (0.0, 30.0):
            assert main.look() is None
        one._beat = 7
        one.look()
        for clock[0] in (60.0, 60.0 + peers.SILENT_SECONDS - 1):
            assert main.look() is None  # it was heard of at 60
        clock[0] += 2
        found = main.look()
        assert found is not None and found.is_lost and "not been heard of" in found.message


def test_of_several_on_other_machines_those_that_went_silent_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, clock = dist.HashStore(), [0.0]
    ranks = [Peers(store, rank, 3) for rank in range(3)]
    for one in (1, 2):
        owner = {"pid": one, "host": f"host-{one}", "sees": "elsewhere"}
        ranks[0]._owners[one] = ranks[3 - one]._owners[one] = owner
    ranks[2]._owners[0] = {"pid": 0, "host": "host-0", "sees": "elsewhere"}

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        assert ranks[2].look() is None  # which goes on beating

    monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(peers.time, "sleep", sleep)
    said = ranks[0].ended_by(RuntimeError("[gloo] Connection reset by peer"))
    assert isinstance(said, ProcessLost)
    assert "rank 0: rank 1 (process 1 on host-1) no longer answers" in said.message
    found = ranks[2].look()  # the rank that is left says the same, as it was told
    assert found is not None and found.as_error().message == said.message


ENDS_BY_FORCE = """
import torch.distributed as dist
from abacist.learning.peers import Ending, Peers
one = Peers(dist.HashStore(), 0, 2)
one._end(Ending(1, "no row for hf_abcdefghijkl \x1b[2J in abcdefgh-mine", "Mend it.", 7))
"""


def test_what_the_thread_says_for_a_process_that_waits_shows_no_secret_and_obeys_no_text(
    imported: Imported,
) -> None:
    done = imported.run("-c", ENDS_BY_FORCE, env=imported.env | {"HF_TOKEN": "abcdefgh-mine"})
    said = "error: rank 1: no row for hf_… \\x1b[2J in <HF_TOKEN>\n  Mend it.\n"
    assert done.returncode == 7 and done.stderr.endswith(said), done.stderr  # behind any warning


def test_the_others_are_told_without_the_secrets_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh-mine")
    store = dist.HashStore()
    Peers(store, 0, 2)._tell(DataError("401 for abcdefgh-mine", "Renew abcdefgh-mine."))
    assert b"abcdefgh-mine" not in store.get("ended/0")


class Silent:
    """A store whose machine has lost its power: what is sent goes nowhere, nothing comes back."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()

    def set(self, name: str, value: str) -> None:
        pass

    def multi_get(self, names: list[str]) -> list[bytes]:
        self.has_ended.wait()
        return [b"", b"0"]


@pytest.mark.parametrize("other", ["alive"], indirect=True)
def test_a_store_that_never_answers_is_not_waited_for_without_end(
    other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, _ = two(other, monkeypatch)
    monkeypatch.setattr(peers, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(peers, "SILENT_SECONDS", 0.1)
    store = main.store = Silent()
    try:
        found = main.look()
    finally:
        store.has_ended.set()
    assert found is not None and found.is_lost and "no answer in 0.1 s" in found.message


def test_processes_that_were_given_something_else_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"settings": {"seed": 1, "beta": 0.0}, "data": {"sha256": "a"}}
    other = {"settings": {"seed": 2, "beta": 0.0}, "data": {"sha256": "a"}}
    monkeypatch.setattr(processes, "gathered", lambda items: [*items, given])
    processes.refuse_differing(given)
    monkeypatch.setattr(processes, "gathered", lambda items: [*items, other])
    with pytest.raises(
        AbacistError, match="rank 1 and rank 0 have different settings: seed is 2 on rank 1"
    ):
        processes.refuse_differing(given)


def test_completions_are_shared_out_and_come_back_in_the_order_of_the_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = ["a", "b", "a", "c", "d", "b"]
    written: dict[int, list[str]] = {}
    monkeypatch.setattr(processes, "count", lambda: 2)

    def write(policy: object, mine: list[str]) -> list[str]:
        written[processes.rank()] = mine
        return [f"{processes.rank()}:{prompt}" for prompt in mine]

    monkeypatch.setattr(processes.generation, "generate", write)
    parts: list[list[tuple[int, str]]] = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)

        def gathered(items: list[tuple[int, str]]) -> list[tuple[int, str]]:
            parts.append(items)
            return [item for part in parts for item in part]

        monkeypatch.setattr(processes, "gathered", gathered)
        if rank == 0:
            with pytest.raises(KeyError):  # the other's share is not there yet
                processes.generate(None, prompts)
        else:
            whole = processes.generate(None, prompts)
    assert whole == ["0:a", "1:b", "0:a", "1:c", "0:d", "1:b"]  # equal prompts stay together
    assert written == {0: ["a", "a", "d"], 1: ["b", "c", "b"]}
