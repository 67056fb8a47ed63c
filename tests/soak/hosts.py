"""Two hosts train one run, and one of them is lost: the other ends, and the run resumes exactly.

The hosts are namespaces of this machine: each has a network, a name and process ids of its own, and
shares the disk. Between them is one cable. So neither sees the other's processes, and a host whose
cable is pulled is as silent as one without power. Needs root on Linux, and `ip` and `unshare`.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from soak.kills import FLAGS, contents
from soak.ledger import Trial

HOSTS = ("abacist-0", "abacist-1")
CABLE = "cable"
PORT = "29577"
MOST_SECONDS = 60.0
LOSSES = ("a process", "a host", "the first host", "the cable")


def why_not() -> str:
    """Why two hosts cannot be made here; empty where they can."""
    if missing := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        return f"there is no `{missing[0]}`"
    if os.geteuid() != 0:
        return "only root may make a network namespace"
    made = subprocess.run(
        ["ip", "netns", "add", "abacist-try"], capture_output=True, encoding="utf-8"
    )
    subprocess.run(["ip", "netns", "del", "abacist-try"], capture_output=True)
    return made.stderr.strip()


def ip(words: str) -> None:
    """Run ``ip`` with these words."""
    subprocess.run(["ip", *words.split()], check=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two hosts and the cable between them, while this lasts."""
    for host in HOSTS:
        ip(f"netns add {host}")
    try:
        ip(f"-n {HOSTS[0]} link add {CABLE} type veth peer name {CABLE} netns {HOSTS[1]}")
        for number, host in enumerate(HOSTS, start=1):
            ip(f"-n {host} addr add 10.77.0.{number}/24 dev {CABLE}")
            ip(f"-n {host} link set lo up")
            ip(f"-n {host} link set {CABLE} up")
        yield
    finally:
        for host in HOSTS:
            for pid in _pids_on(host):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ip(f"netns del {host}")


def train(*arguments: str, place: Path) -> list[subprocess.Popen[bytes]]:
    """``abacist train`` on both hosts, one process each."""
    place.mkdir(parents=True, exist_ok=True)
    started = []
    for rank, host in enumerate(HOSTS):
        named = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        launch = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", "10.77.0.1", "--main_process_port", PORT,
            "--mixed_precision", "no", "--dynamo_backend", "no",
            "--num_cpu_threads_per_process", "1", "-m", "abacist", "train", *arguments,
        ]  # fmt: skip
        with (place / host).open("wb") as file:
            started.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", host, *named, f'hostname {host}; "$@"', "sh", *launch],
                    env=os.environ
                    | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": CABLE},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def ended(hosts: list[subprocess.Popen[bytes]], place: Path) -> tuple[list[int], list[str]]:
    """The exit codes of both hosts, and what they said."""
    codes = [host.wait() for host in hosts]
    return codes, [(place / host).read_text(encoding="utf-8", errors="replace") for host in HOSTS]


def hosts(shared: Path, options: argparse.Namespace) -> list[tuple[str, Callable[[Path], Trial]]]:
    """One loss a run."""
    if reason := why_not():
        print(f"hosts: skipped, {reason}", flush=True)
        return [(f"skipped: {reason}", lambda place: Trial(seen={"skipped": 1}))]
    whole = shared / "run"
    with two_hosts():
        codes, said = ended(train("--output_dir", str(whole), *FLAGS, place=shared), shared)
    if codes != [0, 0]:
        raise RuntimeError("\n".join(said))
    return [(f"{lost} lost", functools.partial(_lose, whole, lost)) for lost in LOSSES]


def _lose(whole: Path, lost: str, place: Path) -> Trial:
    trial, run = Trial(), place / "run"
    with two_hosts():
        started = train("--output_dir", str(run), *FLAGS, place=place)
        while not (run / "rollouts" / "step-000003.parquet").exists():
            if any(host.poll() is not None for host in started):
                raise RuntimeError("\n".join(ended(started, place)[1]))
            time.sleep(0.02)
        if lost == "the cable":
            ip(f"-n {HOSTS[1]} link set {CABLE} down")
        elif lost == "a process":
            os.kill(_trainer_on(HOSTS[1]), signal.SIGKILL)
        else:
            # Without its cable no word of its end gets out, as where the power fails.
            doomed = 0 if lost == "the first host" else 1
            ip(f"-n {HOSTS[doomed]} link set {CABLE} down")
            started[doomed].kill()
        told = time.monotonic()
        codes, said = ended(started, place)
        took = round(time.monotonic() - told, 1)
    trial.seen["most seconds until the other ended"] = took
    wrong = [] if took <= MOST_SECONDS else [f"the other took {took:g} s"]
    for rank in (0, 1):
        is_killed = codes[rank] < 0 or (lost == "a process" and rank == 1)
        if not is_killed and (codes[rank] != 1 or f"error: rank {rank}" not in said[rank]):
            wrong.append(f"host {rank} ended with {codes[rank]}: {said[rank][-400:]}")
    trial.expect(f"{lost} lost", wrong)
    with two_hosts():
        again = place / "again"
        codes, said = ended(train("--resume", str(run), place=again), again)
    one, other = contents(whole), contents(run)
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    trial.expect("resumed", wrong if codes == [0, 0] else [f"resuming ended with {codes}", *said])
    return trial


def _pids_on(host: str) -> list[int]:
    """The processes on a host, by their ids on this machine."""
    listed = subprocess.run(["ip", "netns", "pids", host], stdout=subprocess.PIPE, encoding="utf-8")
    return sorted(map(int, listed.stdout.split()))


def _trainer_on(host: str) -> int:
    """The process that trains on a host, not its launcher."""
    rank = f"RANK={HOSTS.index(host)}".encode()
    return next(
        pid
        for pid in _pids_on(host)
        if rank in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
