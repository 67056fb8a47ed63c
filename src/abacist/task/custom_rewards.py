"""A user's own reward functions: import them by name, and name them when they go wrong.

A reward that raises deep in a trainer, or hands back NaN, costs hours; TRL turns an infinite or NaN
reward into zero gradients without a word, and one that hangs stops a run for ever. :func:`checked`
wraps a reward so that what is wrong is said at once, with the reward's name and the sample.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from abacist.errors import RewardError, UsageError
from abacist.task.reply import completion_text
from abacist.task.watchdog import TimeIsUp, call_within, slice_of

RewardFunc = Callable[..., "list[float] | list[float | None]"]

MAX_REWARD = 1e30  # beyond this, sums and squares overflow in float32
_HOW_TO_NAME = (
    "Name your own reward as module.function, folder/module.function or path/to/file.py:function."
)
_HOW_TO_WRITE = "A reward is `def f(prompts, completions, **columns) -> list[float]`."
_FILE_MODULE = "abacist_reward_file_"
_GIVEN = "<function "  # begins the name of a reward that stands in no file
_MAX_RETRIED = 256  # samples that are tried one by one to find the one that makes a reward raise
DEFAULT_TIMEOUT_SECONDS = 120.0
_sources: dict[Path, bytes | None] = {}  # what each file held when a reward was last taken from it


def listed(rewards: Any) -> list[Any]:
    """One reward or several, names and functions, as a list.

    Raises UsageError for an empty list, RewardError for what is no reward or list of rewards.

    >>> listed("default"), listed(("integer", "xml_count"))
    (['default'], ['integer', 'xml_count'])
    """
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    if isinstance(rewards, Mapping | Set) or not isinstance(rewards, Iterable):
        raise RewardError(
            f"reward_funcs is a {type(rewards).__name__}.",
            "Give a list of names and functions: reward_funcs=['default', my_reward].",
        )
    found = list(rewards)
    if not found:
        raise UsageError("There are no rewards.", "Give names and functions: 'default' is a set.")
    for reward in found:
        if not isinstance(reward, str) and not callable(reward):
            raise RewardError(
                f"A reward is a {type(reward).__name__}, not a function or its name.", _HOW_TO_WRITE
            )
    return found


def import_reward(name: str) -> Callable[..., Any]:
    """The function that ``module.function`` or ``path/to/file.py:function`` names, unwrapped.

    Modules are looked for in the working directory too, as ``trl grpo`` does, and in the folder
    that stands before them: ``folder/module.function``. Raises RewardError, saying which part of
    the name cannot be found, imported or called as a reward.
    """
    place, _, attribute = _split(name)
    if not place or not attribute or name.endswith(".py"):
        raise RewardError(f"'{name}' does not name a reward function.", _HOW_TO_NAME)
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place, name)
    except RewardError:
        raise
    except SystemExit as stop:
        raise RewardError(
            f"The reward '{name}' cannot be imported: its file ends the program ({stop.code}).",
            "Put what it runs as a script under `if __name__ == '__main__':`.",
        ) from stop
    except Exception as error:  # whatever a user's module does when it is imported
        is_relative = place.endswith(".py") and "attempted relative import" in str(error)
        raise RewardError(
            f"The reward '{name}' cannot be imported: {type(error).__name__}: {error}",
            f"The file is part of a package. {_as_part_of_package(place, attribute)}"
            if is_relative
            else _HOW_TO_NAME,
        ) from error
    func = getattr(module, attribute, None)
    if func is None:
        close = get_close_matches(attribute, [key for key in vars(module) if key[0] != "_"], n=1)
        raise RewardError(
            f"'{place}' has no '{attribute}'." + (f" Did you mean '{close[0]}'?" if close else ""),
            _HOW_TO_NAME,
        )
    refuse_wrong_signature(func, name)
    return func


def name_of(func: Callable[..., Any]) -> str:
    """The name by which a reward that was given as a function is kept with a run.

    One that an import finds again is named as a person would name it, by its module or file. A
    function of a notebook or of ``__main__``, a lambda and a closure stand in no file that could be
    imported, and are called ``<function brevity>``: such a run says so when it is to be resumed.

    >>> name_of(lambda completions, **columns: [0.0 for _ in completions])
    '<function lambda>'
    """
    name, module = plain_name(func), sys.modules.get(str(getattr(func, "__module__", "")))
    file = getattr(module, "__file__", None)
    is_importable = (
        module is not None
        and file is not None
        and module.__name__ != "__main__"
        and getattr(module, str(getattr(func, "__name__", "")), None) is func
    )
    if module is None or file is None or not is_importable:
        return f"{_GIVEN}{name}>"
    if module.__name__.startswith(_FILE_MODULE) or "." not in module.__name__:
        return f"{_absolute(Path(file))}:{name}"
    return absolute_reward(f"{module.__name__}.{name}")


def plain_name(func: Callable[..., Any]) -> str:
    """What a reward is called in logs, tables and columns: a lambda is ``lambda``."""
    while isinstance(func, partial):
        func = func.func
    return str(getattr(func, "__name__", type(func).__name__)).strip("<>")


def stands_in_no_file(name: str) -> bool:
    """Whether :func:`name_of` gave this name to a function that cannot be imported."""
    return name.startswith(_GIVEN)


def function_name(name: str) -> str:
    """What the function is called that :func:`stands_in_no_file`.

    >>> function_name("<function brevity>")
    'brevity'
    """
    return name.removeprefix(_GIVEN).removesuffix(">")


def refuse_lost(name: str) -> None:
    """Raise RewardError for the name of a function that stands in no file."""
    if stands_in_no_file(name):
        shown = function_name(name)
        raise RewardError(
            f"The reward '{shown}' was given as a Python function, and stands in no file.",
            f"Give it again: abacist.train(…, reward_funcs=[…, {shown}]). One in a file is found "
            "by its name: path/to/file.py:function.",
        )


def _as_part_of_package(place: str, attribute: str) -> str:
    """How to name a reward whose file imports relatively.

    >>> _as_part_of_package("mine/rewards/short.py", "brief")
    'Name it from the folder above the package, for example mine/rewards.short.brief.'
    """
    path = Path(place).with_suffix("")
    package = path.parent.name or Path.cwd().name
    above = path.parent.parent
    named = f"{package}.{path.name}.{attribute}"
    shown = named if str(above) == "." else f"{above.as_posix()}/{named}"
    return f"Name it from the folder above the package, for example {shown}."


def absolute_reward(name: str) -> str:
    """The same reward by a name that means it in every working directory.

    ``rewards.py:f`` and ``mine.f`` get the folder in which the file or module stands before them,
    if that is seen from the working directory. Every other name is left as it is.
    """
    place, separator, attribute = _split(name)
    path = Path(place).expanduser()
    if separator == ":" and place.endswith(".py"):
        return f"{_absolute(path)}:{attribute}" if path.is_file() else name
    folder = path.parent if _names_folder(place) else Path.cwd()
    if place and attribute and _is_module_of(folder, path.name):
        return f"{_absolute(folder)}{os.sep}{path.name}{separator}{attribute}"
    return name


def may_come_with(name: str, folder: Path) -> bool:
    """Whether a user's reward may be a file in ``folder``, or is found from the working directory.

    So code is told that somebody's run may have brought. Of what is on this machine already, a run
    made here keeps the whole path, or the name of an installed module.
    """
    if absolute_reward(name) != name:
        return True
    place, _, _ = _split(name)
    return _names_folder(place) and Path(place).resolve().is_relative_to(folder.resolve())


def _split(name: str) -> tuple[str, str, str]:
    """File or module, separator and function.

    >>> _split("mine/short.py:brief"), _split("mine.short.brief")
    (('mine/short.py', ':', 'brief'), ('mine.short', '.', 'brief'))
    """
    return name.rpartition(":" if ":" in name else ".")


def _names_folder(place: str) -> bool:
    return "/" in place or os.sep in place


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # symbolic links are kept


def _is_module_of(folder: Path, module: str) -> bool:
    """Whether an import, with ``folder`` first in line, finds the module there."""
    top = module.split(".")[0]
    loaded = sys.modules.get(top)
    if loaded is not None and not _is_from(loaded, folder):
        return False
    if (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file():
        return True
    if not (folder / top).is_dir():
        return False
    try:  # a folder without __init__.py gives way to a package of that name anywhere else
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    return found is None or found.origin is None


def _load_module(place: str, name: str) -> ModuleType:
    if not _names_folder(place):
        _look_in(Path.cwd())
        return _as_it_stands(importlib.import_module(place))
    folder, module_name = _absolute(Path(place).expanduser()).parent, Path(place).name
    if not folder.is_dir():
        raise RewardError(f"There is no folder {folder} for the reward '{name}'.", _HOW_TO_NAME)
    _look_in(folder)
    module = importlib.import_module(module_name)
    if not _is_from(module, folder):
        raise RewardError(
            f"The reward '{name}' cannot be imported: another module is called '{module_name}' "
            f"({getattr(module, '__file__', None) or 'built in'}).",
            "Rename yours, or name it by its file: path/to/file.py:function.",
        )
    return _as_it_stands(module)


def _as_it_stands(module: ModuleType) -> ModuleType:
    """The module, read again where its file is not what it was when a reward was last taken from
    it: a notebook's user edits a reward and trains again in the same process."""
    path = Path(getattr(module, "__file__", None) or "")
    if path.suffix == ".py" and path.is_file():
        source = path.read_bytes()
        if _sources.setdefault(path, source) != source:
            _run(source, path, module)
    return module


def _run(source: bytes, path: Path, module: ModuleType) -> None:
    """Run what a file holds in its module. Not ``importlib.reload``, which takes the compiled file
    where an edit has changed neither the second nor the size."""
    _sources[path] = None  # until it has run to its end
    exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    _sources[path] = source


def _is_from(module: ModuleType, folder: Path) -> bool:
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
    return any(
        _absolute(Path(place)).is_relative_to(_absolute(folder)) for place in places if place
    )


def _look_in(folder: Path) -> None:
    """Put a folder first in line for imports, unless it is in line already."""
    if str(folder) not in sys.path and not ("" in sys.path and folder == Path.cwd()):
        sys.path.insert(0, str(folder))


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"There is no reward file {path}.", _HOW_TO_NAME)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for what it imports from beside it, as for a script
    # Known by its path, so that two files of one name do not shadow each other or a module.
    letters = re.sub(r"\W", "_", str(path))  # the same of a-b.py and a_b.py
    name = f"{_FILE_MODULE}{letters}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    source = path.read_bytes()
    if name in sys.modules and _sources.get(path) == source:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, so that its functions can be pickled
    try:
        _run(source, path, module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def refuse_wrong_signature(func: Any, name: str) -> None:
    """Raise RewardError for what cannot be called as TRL calls a reward."""
    if not callable(func) or isinstance(func, type):
        what = "a class" if isinstance(func, type) else f"a {type(func).__name__}"
        raise RewardError(f"The reward '{name}' is {what}, not a function.", _HOW_TO_WRITE)
    if hasattr(func, "state_dict"):
        raise RewardError(
            f"The reward '{name}' is a model.", f"{_HOW_TO_WRITE} Call the model in one."
        )
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # some built-ins do not tell theirs
        return
    # In this order, so that the one that is missing is named alike every time.
    given = "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"
    columns = [  # any other parameter without a default is a column of the data set
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    try:
        signature.bind(**dict.fromkeys((*given, *columns)))
    except TypeError as error:
        raise RewardError(
            f"The reward '{name}' cannot be called as TRL calls it, by keywords: {error}.",
            f"{_HOW_TO_WRITE} Columns and more arrive as keywords; let `**columns` take them.",
        ) from error


def checked(
    func: Callable[..., Any], timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
) -> Callable[..., Any]:
    """``func``, raising RewardError when it raises or returns something that is no list of rewards,
    or takes longer than ``timeout_seconds`` for one batch (0: however long it takes).

    What it returns is then a list of floats and Nones (not applicable, as in TRL). The wrapper has
    the name of ``func`` and can be pickled if ``func`` can. Coroutine functions stay awaitable.
    """
    if isinstance(func, _Checked):
        return func
    is_async = inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004  an instance with an async __call__
    )
    return (_CheckedAsync if is_async else _CheckedSync)(func, timeout_seconds)


class _Checked:
    def __init__(self, func: Callable[..., Any], timeout_seconds: float) -> None:
        self.func = func
        self.timeout_seconds = timeout_seconds
        self.__name__ = plain_name(func)

    def __repr__(self) -> str:
        return f"checked({self.__name__})"

    def _usable(self, rewards: Any, completions: Sequence[Any]) -> list[float | None]:
        """``rewards`` as floats and Nones, or RewardError."""
        has_no_order = isinstance(rewards, str | bytes | dict | set | frozenset)
        try:
            count = -1 if has_no_order or not hasattr(rewards, "__iter__") else len(rewards)
        except TypeError:  # a generator, or an array of no dimension
            count = -1
        if count < 0:
            raise RewardError(
                f"The reward '{self.__name__}' returned a {type(rewards).__name__}.", _HOW_TO_WRITE
            )
        if count != len(completions):
            raise RewardError(
                f"The reward '{self.__name__}' returned {count} rewards for "
                f"{len(completions)} completions.",
                "It must return one for each, in their order; None where it does not apply.",
            )
        return [self._number(reward, completions, i) for i, reward in enumerate(rewards)]

    def _number(self, reward: Any, completions: Sequence[Any], sample: int) -> float | None:
        if reward is None:
            return None
        try:
            number = math.nan if isinstance(reward, str | bytes) else float(reward)
        except Exception:  # a type of the user's
            number = math.nan
        if math.isfinite(number) and abs(number) < MAX_REWARD:
            return number
        raise RewardError(
            f"The reward '{self.__name__}' returned {_short(repr(reward))} for "
            f"{_sample(completions, sample)}.",
            f"Return a finite number (below {MAX_REWARD:g}), or None for 'not applicable'.",
        )

    def _raised(
        self, error: BaseException, sample: int | None, completions: Sequence[Any]
    ) -> Exception:
        if isinstance(error, RewardError):
            return error
        place = _sample(completions, sample) or f"a batch of {len(completions)} samples"
        return RewardError(
            f"The reward '{self.__name__}' raised {type(error).__name__} on {place}: {error}",
            "A reward must accept any text a model can write; return None where it does not apply.",
        )

    def _took_too_long(self, sample: int | None, completions: Sequence[Any]) -> RewardError:
        batch = f"a batch of {len(completions)} samples, though on none of them alone"
        place = _sample(completions, sample) or batch
        return RewardError(
            f"The reward '{self.__name__}' was stopped after {self.timeout_seconds:g} seconds: it "
            f"hangs on {place}.",
            "Bound what it does: a regular expression that backtracks, a request without a "
            "time-out. If it is only slow, raise --reward_timeout_seconds (0: no limit).",
        )


def _sample(completions: Sequence[Any], sample: int | None) -> str:
    """A completion for a message, by number and text; "" for None."""
    if sample is None:
        return ""
    return f"sample {sample}, {_short(repr(completion_text(completions[sample])))}"


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a reward, its own to change.

    TRL hands the same lists to every reward: one that tidies a text in place would change what the
    others pay for, and what is kept of the rollout.
    """
    return {
        name: [_copied(one) for one in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    }


def _copied(value: Any) -> Any:
    """One sample's value: messages to their last part, and other lists and dicts one deep."""
    if not isinstance(value, list):
        return value.copy() if isinstance(value, dict) else value
    if value and isinstance(value[0], dict):
        return [
            {**one} if type(one) is dict and type(one.get("content")) is str else copy.deepcopy(one)
            for one in value
        ]
    return value.copy()


class _CheckedSync(_Checked):
    def __call__(
        self, /, prompts: Any, completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        everything = {"prompts": prompts, "completions": completions, **columns}
        try:
            rewards = call_within(self.timeout_seconds, partial(self.func, **_own(everything)))
        except TimeIsUp:
            raise self._took_too_long(self._slow_sample(everything), completions) from None
        except Exception as error:
            raise self._raised(error, self._failing_sample(everything), completions) from error
        except SystemExit as error:
            # It would end a training as if it were done. SIGTERM does end it: see `cli.console`.
            if error.code == 128 + signal.SIGTERM:
                raise
            raise self._raised(error, None, completions) from error
        except asyncio.CancelledError as error:  # of a loop of the reward's own: no Exception
            raise self._raised(error, None, completions) from error
        return self._usable(rewards, completions)

    def _failing_sample(self, everything: dict[str, Any]) -> int | None:
        """The first sample on which the reward raises when it gets that one alone."""
        count = len(everything["completions"])
        for sample in range(min(count, _MAX_RETRIED)):
            try:
                self._alone(everything, sample)
            except TimeIsUp:
                return None
            except Exception:
                return sample
        return None

    def _slow_sample(self, everything: dict[str, Any]) -> int | None:
        """The first sample that alone takes a good part of the time the whole batch may take."""
        count = len(everything["completions"])
        deadline = time.monotonic() + 2 * self.timeout_seconds
        for sample in range(count):
            if time.monotonic() > deadline:
                break
            try:
                self._alone(everything, sample)
            except TimeIsUp:
                return sample
            except Exception:  # what it says of one sample alone is not what is asked here
                continue
        return None

    def _alone(self, everything: dict[str, Any], sample: int) -> None:
        one = slice_of(everything, sample, len(everything["completions"]))
        call_within(self.timeout_seconds / 4, partial(self.func, **_own(one)))


class _CheckedAsync(_Checked):
    async def __call__(
        self, /, prompts: Any, completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        everything = {"prompts": prompts, "completions": completions, **columns}
        try:
            rewards = await self._within(self.timeout_seconds, everything)
        except TimeIsUp:
            sample = await self._slow_sample(everything)
            raise self._took_too_long(sample, completions) from None
        except Exception as error:
            raise self._raised(error, None, completions) from error
        return self._usable(rewards, completions)

    async def _within(self, seconds: float, everything: dict[str, Any]) -> Any:
        call: Awaitable[Any] = self.func(**_own(everything))
        task = asyncio.ensure_future(call)
        # Not `wait_for`: a TimeoutError of the reward's own must not be taken for ours.
        done, _ = await asyncio.wait({task}, timeout=seconds or None)
        if not done:
            task.cancel()
            raise TimeIsUp
        return task.result()

    async def _slow_sample(self, everything: dict[str, Any]) -> int | None:
        """The first sample that alone takes a good part of the time; all are tried at once."""
        count = len(everything["completions"])
        calls = (
            self._within(self.timeout_seconds / 4, slice_of(everything, sample, count))
            for sample in range(min(count, _MAX_RETRIED))
        )
        outcomes = await asyncio.gather(*map(_outcome, calls))
        return next((i for i, error in enumerate(outcomes) if isinstance(error, TimeIsUp)), None)


async def _outcome(call: Awaitable[Any]) -> BaseException | None:
    try:
        await call
    except (Exception, TimeIsUp) as error:
        return error
    return None


def _short(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def call_reward(
    reward: Callable[..., Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """What a reward pays for each completion, called as TRL calls it; async ones are awaited."""
    paid = reward(
        prompts=prompts,
        completions=completions,
        completion_ids=completion_ids,
        trainer_state=SimpleNamespace(global_step=0, max_steps=1, epoch=0.0),
        log_extra=_ignore,
        log_metric=_ignore,
        **columns,
    )
    return list(_awaited(paid) if inspect.iscoroutine(paid) else paid)


def _awaited(call: Coroutine[Any, Any, Any]) -> Any:
    """What ``call`` returns, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(call)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, call).result()


def _ignore(*values: Any, **named: Any) -> None:
    """Stands in for TRL's logging callbacks."""
