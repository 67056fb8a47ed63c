"""The whole of a model whose weights lie in shards on several processes (FSDP2).

FSDP's modules gather a layer's weights when they are called, and so once for every token that is
written. :class:`WholeModel` gathers all of them once, into a plain model of the same architecture,
which any part that reads bare weights takes as it takes one that was never sharded.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import nn
from torch.distributed.tensor import DTensor


class WholeModel:
    """A plain copy of ``model``, which is not sharded yet, without its weights.

    The parameters and buffers of ``plain`` have the shapes, dtypes and ``device`` of the weights
    that they stand for, and no memory until :meth:`gathered` holds those.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        # deepcopy takes what it finds here for a tensor's copy: no weight is copied, and one that
        # two modules share stays one.
        empty: dict[int, Any] = {}
        for _, one in _tensors(model):
            number = torch.zeros((), dtype=one.dtype, device=device).expand(one.shape)
            is_parameter = isinstance(one, nn.Parameter)
            empty[id(one)] = nn.Parameter(number, one.requires_grad) if is_parameter else number
        self.plain = copy.deepcopy(model, empty)

    @contextmanager
    def gathered(self, sharded: Any) -> Iterator[Any]:
        """The plain model with the weights of ``sharded`` as they are now, in its own dtypes.

        A collective: every process must enter it. ``plain`` is empty again afterwards. What is
        written to it does not reach ``sharded``.
        """
        # Checkpointing and compilation by accelerate put their wrappers' names between.
        now = fsdp2_canonicalize_names(dict(_tensors(sharded)))
        whole = {id(empty): _whole(now[name], empty) for name, empty in _tensors(self.plain)}
        places = [
            (module, name, empty)
            for module in self.plain.modules()
            for name, empty in _tensors(module, recurse=False)
        ]
        try:
            for module, name, empty in places:
                setattr(module, name, whole[id(empty)])
            yield self.plain.train(sharded.training)
        finally:
            for module, name, empty in places:
                setattr(module, name, empty)


def _tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(
        module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse)
    )


def _whole(now: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """``now``, of all processes, in the dtype of ``empty`` and a parameter where that is one."""
    now = now.detach().to(empty.device)  # from the CPU, where shards are offloaded to it
    whole = (now.full_tensor() if isinstance(now, DTensor) else now).to(empty.dtype)
    is_parameter = isinstance(empty, nn.Parameter)
    return nn.Parameter(whole, requires_grad=False) if is_parameter else whole
