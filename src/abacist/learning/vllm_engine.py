"""vLLM as the engine that samples: what it needs, and what its end in the middle of a run is.

TRL looks for vLLM when its trainer is made, after the model has been loaded. :func:`look_for` asks
before that, and says what is missing. While a run goes on, :func:`lost_if_silent` turns what comes
of a server that has gone away into one error, at which the trainer saves the last whole step.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import PurePath
from typing import Any
from urllib.parse import urlparse

from trl.import_utils import is_vllm_available

from abacist.errors import EngineLost, ModelError, UsageError, first_line
from abacist.learning import processes
from abacist.learning.config import Config
from abacist.learning.limits import named
from abacist.learning.tracking import Watcher
from abacist.policy.choices import choose_device

START_SERVER = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL "
    """--weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs"""
)
_ASK_SECONDS = 10.0
_ASK_AGAIN_SECONDS = 2.0
_HTTP_NOT_FOUND = 404
# What becomes of asking, where something else answers.
_FAULTS = (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Server:
    """A vLLM server that answers: the model it serves, and its limit of prompt and reply."""

    url: str
    model: str
    max_model_len: int | None
    logprobs_mode: str | None


def look_for(config: Config, watcher: Watcher) -> Server | None:
    """The server that ``config`` samples with; None where it needs none.

    Waits for one that is still starting, as TRL does, ``vllm_server_timeout`` seconds. Raises
    UsageError where vLLM cannot be used here at all, ModelError for a server that does not answer
    or was started without what TRL needs.
    """
    training = config.training
    if not training.use_vllm:
        return None
    flag = named("use_vllm", config.sources)
    without = "Train without it: Abacist's own engine writes the replies."
    if not is_vllm_available():
        raise UsageError(
            f"{flag} cannot be used: vLLM is not available here",
            f"Install it in an environment of its own (docs/engines.md). {without}",
        )
    device, _ = choose_device(config.device)
    if device.type != "cuda":
        raise UsageError(
            f"{flag} cannot be used on the device {device.type}: vLLM is given the new weights "
            "of each step, and TRL can do that on CUDA devices only",
            without,
        )
    if training.vllm_mode != "server":
        return None
    url, seconds = url_of(training), float(training.vllm_server_timeout)
    if not _is_address(url):
        raise UsageError(
            f"{named('vllm_server_base_url', config.sources)} {url} is not an address",
            "Write it as http://HOST:PORT.",
        )
    server = processes.from_main(lambda: _asked(url, seconds, watcher))
    limit = f", {server.max_model_len:,} tokens at most" if server.max_model_len else ""
    watcher.note(f"  vLLM: {url} serves {server.model}{limit}")
    trained = str(config.model.model_name_or_path)
    if PurePath(server.model).name.lower() != PurePath(trained).name.lower():
        watcher.note(
            f"  warning: the vLLM server serves {server.model}, and this run trains {trained}: the "
            "server gets this run's weights at each step, so it needs the same architecture and "
            "tokenizer"
        )
    if server.logprobs_mode not in (None, "processed_logprobs"):
        watcher.note(
            f"  warning: the vLLM server runs with --logprobs-mode {server.logprobs_mode}: without "
            "processed_logprobs the correction for its rounding is biased"
        )
    return server


def url_of(args: Any) -> str:
    """Where the server is, by the arguments of TRL."""
    base = args.vllm_server_base_url
    return (
        str(base).rstrip("/") if base else f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    )


def settle(args: Any, stop_ids: Sequence[int]) -> None:
    """Set in the arguments of TRL what it is to ask of vLLM: the stop tokens, and where."""
    given = args.generation_kwargs
    args.generation_kwargs = stopping_at(stop_ids, given if isinstance(given, dict) else {})
    if args.vllm_server_base_url:  # with a slash at its end TRL asks //health, and for ever
        args.vllm_server_base_url = url_of(args)


def stopping_at(stop_ids: Sequence[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """``generation_kwargs`` under which vLLM ends a reply where the trainer sees it end.

    By itself it stops at what the checkpoint's generation config declares, and a base model's does
    not declare the token that closes its template's turn.

    >>> stopping_at([2, 7], {"seed": 1, "stop_token_ids": [5]})
    {'seed': 1, 'stop_token_ids': [2, 7, 5]}
    """
    also = given.get("stop_token_ids") or []
    return {**given, "stop_token_ids": list(dict.fromkeys([*stop_ids, *also]))}


@contextmanager
def lost_if_silent(args: Any, step: int) -> Iterator[None]:
    """Raises :class:`EngineLost` for what TRL's client raises where the server gives no replies."""
    try:
        yield
    except Exception as error:
        # The client raises what `requests` does, an OSError, and a plain Exception for a status
        # other than 200. Anything else is of another kind.
        if not (isinstance(error, OSError) or type(error) is Exception):
            raise
        said = type(error).__name__ if isinstance(error, OSError) else first_line(error)
        raise EngineLost(
            f"At step {step} the vLLM server at {url_of(args)} gave no replies: {said}",
            "Start the server again.",
        ) from error


def _is_address(url: str) -> bool:
    try:
        parts = urlparse(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port, or brackets
        return False


def _asked(url: str, seconds: float, watcher: Watcher) -> Server:
    _wait_for(url, seconds, watcher)
    try:
        config = _get(f"{url}/server_info?config_format=json")["vllm_config"]
    except urllib.error.HTTPError as error:
        if error.code != _HTTP_NOT_FOUND:
            raise _broken(url, error) from error
        raise ModelError(
            f"The vLLM server at {url} was started without VLLM_SERVER_DEV_MODE=1, and takes no "
            "new weights.",
            f"Start it by  {START_SERVER}",
        ) from None
    except _FAULTS as error:
        raise _broken(url, error) from error
    if config.get("weight_transfer_config") is None:
        raise ModelError(
            f"The vLLM server at {url} was started without --weight-transfer-config, and takes no "
            "new weights.",
            f"Start it by  {START_SERVER}",
        )
    try:
        model = _get(f"{url}/v1/models")["data"][0]
        # Its id may be a name of the server's own; the root is what was loaded.
        name, limit = str(model.get("root") or model["id"]), model.get("max_model_len")
    except _FAULTS as error:
        raise _broken(url, error) from error
    return Server(url, name, limit, (config.get("model_config") or {}).get("logprobs_mode"))


def _wait_for(url: str, seconds: float, watcher: Watcher) -> None:
    until, has_said = time.monotonic() + seconds, False
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_ASK_SECONDS):
                return
        except (OSError, HTTPException) as error:
            found = first_line(error)
        if time.monotonic() >= until:
            raise ModelError(
                f"The vLLM server at {url} did not answer for {seconds:g} seconds "
                f"(--vllm_server_timeout): {found}",
                f"Start it by  {START_SERVER}",
            )
        if not has_said:
            watcher.note(f"  waiting for the vLLM server at {url}, {seconds:g} seconds at most")
            has_said = True
        time.sleep(min(_ASK_AGAIN_SECONDS, max(0.0, until - time.monotonic())))


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=_ASK_SECONDS) as response:
        return json.load(response)


def _broken(url: str, error: Exception) -> ModelError:
    return ModelError(
        f"What answers at {url} is not a vLLM server that TRL can use: {first_line(error)}",
        f"Start one by  {START_SERVER}",
    )
