"""CUDA graphs: the step that writes one token for every row, recorded once and then replayed.

Launched from Python, a token is about 25 kernels a layer, which takes the host several times as
long as the arithmetic takes the GPU. A graph launches them all at once. It can only be replayed on
the same tensors in the same sizes. So the number of rows and the number of tokens attended to are
rounded up to a few sizes (:func:`padded_rows`, :func:`padded_window`), and what is added is
masked. Every generation has new weights and so new graphs: a size is recorded only if enough tokens
can use it.

Graphs are optional. If a size cannot be recorded, for example for lack of memory, decoding goes on
eagerly, as on other devices. The first replay of every graph must reproduce the eager step before
it. Either failure is logged once, and the process then uses no more graphs.
``ABACIST_CUDA_GRAPHS=0`` in the environment turns graphs off.
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
"""Changes tensors that never move; returns the logits [N, V] it chose tokens by."""

TOKENS_BETWEEN_LOOKS = 4  # at which rows have finished; each look waits for the GPU
_WORTH_RECORDING_TOKENS = 16
_SMALLEST_WINDOW_TOKENS = 128
_FEWER_ROWS = 4  # ratio between one number of rows and the next smaller one

_given_up: str | None = None


def padded_rows(alive: int, most: int) -> int:
    """How many rows to decode where ``alive`` are in work, of at most ``most``.

    >>> [padded_rows(alive, 50) for alive in (50, 14, 13, 4, 1)]
    [50, 50, 13, 4, 1]
    """
    rows = most
    while rows > fewer_rows(rows) >= alive:
        rows = fewer_rows(rows)
    return rows


def fewer_rows(rows: int) -> int:
    """The next smaller number of rows; 1 for 1."""
    return -(-rows // _FEWER_ROWS)


def padded_window(window: int, budget_tokens: int) -> int:
    """How many tokens of a row to attend to where ``window`` of ``budget_tokens`` are written.

    >>> [padded_window(tokens, 520) for tokens in (1, 129, 256, 500)]
    [128, 256, 256, 520]
    """
    tokens = _SMALLEST_WINDOW_TOKENS
    while tokens < window:
        tokens *= 2
    return budget_tokens if tokens + _WORTH_RECORDING_TOKENS > budget_tokens else tokens


Replay = Callable[[], None]
"""Runs a recorded step again, on what its tensors hold now."""


class Recorder(Protocol):
    """Records steps. Tests bring their own."""

    def warm_up(self, step: Step) -> torch.Tensor:
        """Run ``step`` in the conditions under which it will be recorded."""

    def record(self, step: Step) -> tuple[Replay, torch.Tensor]:
        """Record ``step`` without running it. Returns the replay and the tensor of its results."""

    def close(self) -> None:
        """Free everything recorded."""


class WrongReplayError(RuntimeError):
    """A replay did not do what its step did, so nothing of its batch can be trusted."""


class Replays:
    """The graphs of one generation."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recorded: dict[Hashable, Replay] = {}

    def take(
        self, key: Hashable, step: Step, changed: Sequence[torch.Tensor], tokens_left: int
    ) -> bool:
        """Run ``step`` or its replay. Returns False if there will be no replays from now on.

        Args:
            key: steps with the same key compute the same function of the same tensors.
            changed: the tensors that hold the progress of the batch, the first of them integers.
                When these are restored and the step is run again, other tensors that the step
                writes to must not change.
            tokens_left: how many more steps with this key there can be.

        Raises :class:`WrongReplayError` if the first replay does not do what the step did.
        """
        if (replay := self._recorded.get(key)) is not None:
            replay()
        elif tokens_left < _WORTH_RECORDING_TOKENS:
            step()
        else:
            return self._record(key, step, changed)
        return True

    def _record(self, key: Hashable, step: Step, changed: Sequence[torch.Tensor]) -> bool:
        # Run eagerly, record, restore the state, replay, compare: after this the batch is one step
        # further, by the replay.
        before = [tensor.clone() for tensor in changed]
        try:
            expected = self._recorder.warm_up(step)
            after = [tensor.clone() for tensor in changed]
            replay, logits = self._recorder.record(step)
        except RuntimeError as error:  # no memory, the driver, an operation that is not allowed
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
        """Free everything recorded."""
        self._recorded.clear()
        self._recorder.close()


def with_replays(
    write: Callable[[Replays | None], list[list[int]]], device: torch.device, budget_tokens: int
) -> list[list[int]]:
    """The result of ``write``, called with replays if ``device`` and ``budget_tokens`` allow them.

    If a replay turns out wrong, ``write`` is called a second time, without replays.
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


def unsupported_reason() -> str | None:
    """Why CUDA decodes without graphs, as the end of a sentence; None if it decodes with them."""
    if os.environ.get("ABACIST_CUDA_GRAPHS") == "0":
        return "ABACIST_CUDA_GRAPHS=0 turns them off"
    return _given_up


def description(device: torch.device) -> str | None:
    """How tokens are decoded on ``device``, as a phrase; None if it is not a CUDA device."""
    if device.type != "cuda":
        return None
    return (
        "by CUDA graphs"
        if (why := unsupported_reason()) is None
        else f"without CUDA graphs ({why})"
    )


def cuda_recorder(device: torch.device) -> Recorder | None:
    """The recorder for ``device``; None if it has none or graphs are off."""
    is_supported = device.type == "cuda" and unsupported_reason() is None
    return _CudaRecorder(device) if is_supported else None


class _CudaRecorder:
    """Records ``torch.cuda.CUDAGraph``s. They can share one memory pool, because they are replayed
    one at a time and no result of a replay is read after the next one."""

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
        # Not ``torch.cuda.graph``: it empties the allocator's cache for every graph, and stays on
        # the other stream if recording fails. "thread_local": other threads may go on using CUDA.
        with torch.cuda.stream(_stream(self._device)):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = step()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # repeats the first error
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
    """The stream to record on. One per process: cuBLAS keeps tens of megabytes for each stream."""
    return torch.cuda.Stream(device)


def _free_generator(device: torch.device) -> None:
    """Detach the device's generator from a failed recording, which older PyTorch does not do."""
    for number, generator in enumerate(torch.cuda.default_generators):
        if number == device.index:
            generator.graphsafe_set_state(generator.clone_state())


def _put(contents: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
    for content, tensor in zip(contents, into, strict=True):
        tensor.copy_(content)


def _agree(
    logits: torch.Tensor, expected: torch.Tensor, state: torch.Tensor, after: torch.Tensor
) -> bool:
    """Whether a replay gave the same logits as the step, up to rounding, and changed the same.

    ``state`` and ``after`` [integers per row, N], after the replay and after the step; the first
    line is the token chosen.
    """
    if not bool(expected.isfinite().all()):  # reported by the batch itself
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
    logger.warning("Abacist: decoding continues without CUDA graphs, slower, because %s.", reason)


def _reason(error: RuntimeError) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU has too little memory to record them"
    said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return f"recording one failed ({said.rstrip('.')})"
