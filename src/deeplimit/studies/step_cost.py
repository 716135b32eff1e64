"""What one training step costs: the memory at its peak, and the time, each in passes of its own."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


def peak_memory(step: Step, model: nn.Module, device: torch.device) -> int:
    """Bytes that a step holds at its peak beyond what was there before, by the allocator's account.

    Parameters and their gradients are there before: what is measured is states, what the layers
    save, and working space, one parameter's new gradient at a time included.
    """
    before = [(p, p.grad) for p in model.parameters()]
    collects = gc.isenabled()
    gc.disable()  # or what was left lying about before might be released in the step
    try:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        return _cuda_peak(step, device) if device.type == "cuda" else _cpu_peak(step)
    finally:
        for p, gradient in before:
            p.grad = gradient
        if collects:
            gc.enable()


def median_times(
    preparations: Sequence[Callable[[], None]],
    step: Step,
    model: nn.Module,
    device: torch.device,
    repetitions: int,
) -> list[float]:
    """Seconds of a step after each preparation, medians; they take turns.

    The preparations are not timed; gradients are None before each step.
    """
    times: list[list[float]] = [[] for _ in preparations]
    for _ in range(repetitions):
        for mine, prepare in zip(times, preparations, strict=True):
            prepare()
            model.zero_grad(set_to_none=True)
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            mine.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return [statistics.median(mine) for mine in times]


def _cuda_peak(step: Step, device: torch.device) -> int:
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(step: Step) -> int:
    """From the profiler's record of every allocation and release: glibc's own figures say little.

    Freed blocks below its mmap threshold stay with the process.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
