"""CUDA graphs: the step that writes one token for every row, recorded once and then replayed.

From Python a token is some 25 kernel launches a layer, which takes a GPU's host several times as
long as the arithmetic takes the GPU. A graph launches them all at once. It can be replayed only on
the same tensors in the same sizes, so rows and tokens behind them are rounded up to few sizes
(:func:`padded_rows`, :func:`padded_window`), and what is added is masked. Weights are new for every
generation, and so are the graphs: a size is recorded only where it can serve enough tokens.

Nothing depends on it. A size that cannot be recorded, for want of memory or whatever else, is
decoded eagerly from there on, as on any other device; and the first replay of every graph must
reproduce the eager step before it. Either is said once, and the process then stays without graphs.
``ABACIST_CUDA_GRAPHS=0`` in the environment turns them off.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

Step = Callable[[], torch.Tensor]
"""Changes tensors that stay where they are; returns the scores [N, V] it chose tokens by."""

TOKENS_BETWEEN_LOOKS = 4  # at who has finished, for which the host waits for the GPU
_WORTH_RECORDING_TOKENS = 16
_SMALLEST_WINDOW_TOKENS = 128
_FEWER_ROWS = 4  # a size of rows is so many times the next smaller one

_given_up: str | None = None


def padded_rows(alive: int, most: int) -> int:
    """So many rows are decoded where ``alive`` are wanted, at most ``most``.

    >>> [padded_rows(alive, 50) for alive in (50, 14, 13, 4, 1)]
    [50, 50, 13, 4, 1]
    """
    rows = most
    while rows > fewer_rows(rows) >= alive:
        rows = fewer_rows(rows)
    return rows


def fewer_rows(rows: int) -> int:
    """The next smaller size; of one row, that."""
    return -(-rows // _FEWER_ROWS)


def padded_window(window: int, budget_tokens: int) -> int:
    """So many tokens of a row are attended to where ``window`` are written, of ``budget_tokens``.

    >>> [padded_window(tokens, 520) for tokens in (1, 129, 256, 500)]
    [128, 256, 256, 520]
    """
    tokens = _SMALLEST_WINDOW_TOKENS
    while tokens < window:
        tokens *= 2
    return budget_tokens if tokens + _WORTH_RECORDING_TOKENS > budget_tokens else tokens


Replay = Callable[[], None]
"""Does a recorded step again, on whatever its tensors hold now."""


class Recorder(Protocol):
    """What can record steps; a test brings its own."""

    def warm_up(self, step: Step) -> torch.Tensor:
        """Do ``step`` in the surroundings in which it will be recorded."""

    def record(self, step: Step) -> tuple[Replay, torch.Tensor]:
        """Record ``step`` without doing it; and where every replay leaves what it returns."""

    def close(self) -> None:
        """Let go of everything recorded."""


class WrongReplayError(RuntimeError):
    """A replay did something else than its step: nothing of its batch can be trusted."""


class Replays:
    """The graphs of one generation."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recorded: dict[Hashable, Replay] = {}

    def take(
        self, key: Hashable, step: Step, changed: Sequence[torch.Tensor], tokens_left: int
    ) -> bool:
        """Do ``step``, or replay it, and say whether there will be replays from now on.

        Args:
            key: steps of one key compute the same function of the same tensors.
            changed: the tensors that say how far the batch is, the first of them integers; other
                tensors that the step writes to must not change if it is done again from there.
            tokens_left: how often a step of this key can follow at most.

        Raises :class:`WrongReplayError` if the first replay is not what the step did.
        """
        if (replay := self._recorded.get(key)) is not None:
            replay()
        elif tokens_left < _WORTH_RECORDING_TOKENS:
            step()
        else:
            return self._record(key, step, changed)
        return True

    def _record(self, key: Hashable, step: Step, changed: Sequence[torch.Tensor]) -> bool:
        before = [tensor.clone() for tensor in changed]
        try:
            expected = self._recorder.warm_up(step)
            after = [tensor.clone() for tensor in changed]
            replay, logits = self._recorder.record(step)
        except RuntimeError as error:  # of memory, of the driver, of an operation not allowed
            self.close()
            _put(before, changed)
            _give_up(_reason(error))
            step()
            return False
        _put(before, changed)
        replay()
        if not _agree(logits, expected, changed[0], after[0]):
            _give_up("a replay did not reproduce the step that was recorded")
            raise WrongReplayError
        self._recorded[key] = replay
        return True

    def close(self) -> None:
        """Let go of everything recorded."""
        self._recorded.clear()
        self._recorder.close()


def with_replays(
    write: Callable[[Replays | None], list[list[int]]], device: torch.device, budget_tokens: int
) -> list[list[int]]:
    """What ``write`` returns, given replays where there are any for so many tokens on ``device``.

    It is called a second time, without, should a replay have gone wrong.
    """
    recorder = cuda_recorder(device) if budget_tokens > _WORTH_RECORDING_TOKENS else None
    if recorder is None:
        return write(None)
    replays = Replays(recorder)
    with contextlib.closing(replays):
        try:
            return write(replays)
        except WrongReplayError:
            replays.close()
            return write(None)


def obstacle() -> str | None:
    """Why CUDA decodes without graphs, as the end of a sentence; None: it decodes with them."""
    if os.environ.get("ABACIST_CUDA_GRAPHS") == "0":
        return "ABACIST_CUDA_GRAPHS=0 turns them off"
    return _given_up


def description(device: torch.device) -> str | None:
    """How a token is decoded on ``device``, as a phrase; None where there is no choice."""
    if device.type != "cuda":
        return None
    return "by CUDA graphs" if (why := obstacle()) is None else f"without CUDA graphs ({why})"


def cuda_recorder(device: torch.device) -> Recorder | None:
    """What records on ``device``; None: nothing does, or is meant to."""
    return _CudaRecorder(device) if device.type == "cuda" and obstacle() is None else None


class _CudaRecorder:
    """``torch.cuda.CUDAGraph``, all in one pool of memory: replayed one at a time, and nothing of
    one replay is read after the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, step: Step) -> torch.Tensor:
        aside, here = _stream(self._device), torch.cuda.current_stream(self._device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            logits = step()
        here.wait_stream(aside)
        return logits

    def record(self, step: Step) -> tuple[Replay, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        torch.cuda.synchronize(self._device)
        # Not ``torch.cuda.graph``: it empties the allocator's cache for each graph, and stays on
        # the other stream if the recording fails. Other threads may do as they please meanwhile.
        with torch.cuda.stream(_stream(self._device)):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = step()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says no more than the first error
                    graph.capture_end()
                _free_generator(self._device)
                raise
            graph.capture_end()
        return graph.replay, logits

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """To record on: one for the process, for cuBLAS keeps tens of megabytes for each it has met."""
    return torch.cuda.Stream(device)


def _free_generator(device: torch.device) -> None:
    """Earlier PyTorch leaves the device's generator in a recording that has failed."""
    for number, generator in enumerate(torch.cuda.default_generators):
        if number == device.index:
            generator.graphsafe_set_state(generator.clone_state())


def _put(contents: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
    for content, tensor in zip(contents, into, strict=True):
        tensor.copy_(content)


def _agree(
    logits: torch.Tensor, expected: torch.Tensor, state: torch.Tensor, after: torch.Tensor
) -> bool:
    """Whether replay and step chose by the same scores, up to rounding, and did the same then.

    ``state`` [K, N]: integers of every row, the first of them the token it has chosen.
    """
    if not bool(expected.isfinite().all()):  # which is told elsewhere
        return True
    error, scale = (logits - expected).abs().amax(), expected.abs().amax()
    if not bool(error <= scale * torch.finfo(expected.dtype).eps ** 0.5):
        return False
    rows = expected.shape[0]
    same_scores = (logits == expected).all(dim=1)
    same_choice = state[0, :rows] == after[0, :rows]
    return bool((same_choice | ~same_scores).all()) and torch.equal(state[1:], after[1:])


def _give_up(reason: str) -> None:
    global _given_up
    _given_up = reason
    logger.warning("Abacist: decoding goes on without CUDA graphs, slower, because %s.", reason)


def _reason(error: RuntimeError) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory does not suffice to record them"
    said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return f"recording one failed ({said.rstrip('.')})"
