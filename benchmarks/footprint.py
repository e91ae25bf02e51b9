"""The memory that a training step takes: kept tensors, peaks, and state per entry."""

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from record import status
from shapes import Batch, Shape, build, draw
from torch import Tensor, nn
from trainees import Trainee, optimizer_of

Record = dict[str, Any]


def storages(tensor: Tensor) -> dict[int, int]:
    """Return the bytes of the storages behind a tensor, by address."""
    parts = [tensor]
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    found = [part.untyped_storage() for part in parts]
    return {each.data_ptr(): each.nbytes() for each in found}


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward pass keeps for backward.

    Parameters, buffers and the batch do not count; shared storages count once.
    """
    known: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers(), *batch.values()]:
        known |= storages(tensor)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update(storages(tensor))
        return tensor.detach()  # an output that its own graph holds is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(size for place, size in kept.items() if place not in known)


def peaks(each: Trainee, shape: Shape, device: str, dtype: str) -> Record:
    """Return what two steps take at most beyond the bare model, in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_peak, each, shape, device, dtype).result()


def _peak(each: Trainee, shape: Shape, device: str, dtype: str) -> Record:
    model, batch = (
        build(shape, each.seed, device, dtype),
        draw(shape, each.seed, device),
    )
    on_gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if on_gpu else _resident()
    model = each.build(model)
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _resident()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    optimizer = optimizer_of(model)
    for _ in range(2):
        model(**batch).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM")
    return {"before": before, "peak": peak, "beyond": peak - before}


def _resident() -> int:
    """Give freed memory back, and return what is left."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> Record:
    """Return IRD's bytes per entry, of tensors as they are after a backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    entries = sum(p.numel() for p in trained)
    parts = {
        "indices": [b for n, b in model.named_buffers() if "irdelta" in n],
        "supports": [
            support.held
            for module in model.modules()
            for named in getattr(module, "_supports", {}).values()
            for support in named.values()
            if support.held is not None
        ],
        "values": trained,
        "gradients": [p.grad for p in trained if p.grad is not None],
        "moments": [
            t for state in optimizer.state.values() for t in state.values() if t.ndim
        ],
    }
    found = {n: sum(t.nbytes for t in ts) / entries for n, ts in parts.items()}
    return {**found, "all": sum(found.values())}
