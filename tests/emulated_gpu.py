"""Run a program on a CUDA device that does not exist: ``python emulated_gpu.py program.py …``.

``-m module`` runs a module. ``emulated_gpu.cpp`` gives PyTorch a device "cuda:0" that lies in
ordinary memory and computes on the CPU; here the part of ``torch.cuda`` that Python sees is made
to fit: graphs, memory, streams. It must be loaded before PyTorch is imported, so a test runs it in
a process of its own.

It shows what a program does on a GPU (which path it takes, whether its tensors are where they
must be, whether what it captures may be captured), and nothing about speed. Kernels that only a
real GPU has (fused attention, FlashAttention) are not there.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def compiler() -> str | None:
    """The compiler that will be used, if there is one."""
    return shutil.which("g++") or shutil.which("c++")


def build(folder: Path) -> Path:
    """The compiled device in ``folder``; where it is missing, that takes ten to twenty seconds."""
    library = folder / "emulated_gpu.so"
    if library.exists():
        return library
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    aside = library.with_suffix(f".{os.getpid()}")
    command = [
        *(compiler() or "c++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE)),
        *(f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"),
        *(f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"),
        *("-o", str(aside)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    aside.replace(library)
    return library


def install(library: Path) -> ctypes.CDLL:
    """Make the device PyTorch's. Raises :class:`RuntimeError` if PyTorch is imported already."""
    if "torch" in sys.modules:
        raise RuntimeError("PyTorch has been imported: it has made up its mind about devices.")
    # In front of PyTorch's own libraries, and with its symbols for all: see the end of the C++.
    device = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    for name in ("allocated_bytes", "peak_bytes", "launches"):
        getattr(device, name).restype = ctypes.c_int64
    device.set_limit.argtypes = [ctypes.c_int64]
    import torch

    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_name = lambda device=None: "an emulated GPU"
    cuda.is_bf16_supported = lambda including_emulation=True: True
    memory = 8 * 2**30
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="an emulated GPU", total_memory=memory, major=8, minor=0, multi_processor_count=1
    )
    cuda.mem_get_info = lambda device=None: (memory - device_bytes(), memory)
    device_bytes = device.allocated_bytes
    fractions = [1.0]

    def set_fraction(fraction: float, asked: Any = None) -> None:
        fractions[0] = fraction
        device.set_limit(int(fraction * memory))

    cuda.set_per_process_memory_fraction = set_fraction
    cuda.get_per_process_memory_fraction = lambda asked=None: fractions[0]
    for name in ("memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda device=None: device_bytes())
    for name in ("max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda asked=None: device.peak_bytes())
    cuda.reset_peak_memory_stats = lambda asked=None: device.forget_peak()
    for name in ("synchronize", "set_device", "empty_cache", "ipc_collect", "manual_seed"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.manual_seed_all = cuda.manual_seed
    for module in (cuda, cuda.random):  # what is drawn on the device, the CPU draws
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.get_rng_state_all = lambda: [torch.get_rng_state()]
        module.set_rng_state = module.set_rng_state_all = lambda *args: None
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.graph_pool_handle = lambda: (0, 0)
    cuda.is_current_stream_capturing = lambda: bool(device.is_capturing())

    class CUDAGraph:
        """Records what is launched while it captures, and launches it again on the same memory."""

        def __init__(self, keep_graph: bool = False) -> None:
            self.number: int | None = None

        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            self.number = device.begin_capture()

        def capture_end(self) -> None:
            device.end_capture()

        def replay(self) -> None:
            device.replay_graph(self.number)

        def reset(self) -> None:
            if self.number is not None:
                device.drop_graph(self.number)
                self.number = None

        def pool(self) -> tuple[int, int]:
            return (0, 0)

        def __del__(self) -> None:
            self.reset()

    @contextlib.contextmanager
    def graph(cuda_graph: CUDAGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
        cuda_graph.capture_begin()
        try:
            yield
        finally:
            cuda_graph.capture_end()

    cuda.CUDAGraph, cuda.graph = CUDAGraph, graph
    return device


class Stream:
    """A stream: everything is done in order here, at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def main() -> int:
    """Install the device kept in the folder $EMULATED_GPU, then run what the arguments say."""
    install(build(Path(os.environ["EMULATED_GPU"])))
    try:
        if sys.argv[1] == "-m":
            del sys.argv[0:2]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            del sys.argv[0]
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # PyTorch's thread for the device's gradients outlives the program. Where it still frees Python
    # objects while the interpreter goes, Python ends the thread and C++ the process, by abort().
    os._exit(code)
