"""The largest memory that was in use, phase by phase, and the clock of a GPU.

On a GPU that is what torch's allocator had handed out there; of the process it is the resident set, whose high-water mark
Linux lets its owner set back (proc_pid_clear_refs(5), value 5). Where a system does not, nothing is said of the process: the
mark since it began would call every phase as large as the largest one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kibitz.ledger import PEAKS, Clock, HostClock
from kibitz.types import is_gpu

MARK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Gauge:
    """Measures the peak memory of one device and of this process; on a CPU the two are one."""

    device: torch.device

    def reset(self) -> None:
        """A phase begins."""
        if is_gpu(self.device):
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)
        _reset_host()

    def peaks(self) -> dict[str, float]:
        """Bytes since then, by the names of `PEAKS`; what is not known is left out."""
        of_device, of_host = PEAKS
        host = _host_peak()
        if not is_gpu(self.device):
            return {} if host is None else {of_device: host}
        found = {of_device: float(torch.get_device_module(self.device).max_memory_allocated(self.device))}
        return found if host is None else {**found, of_host: host}


@dataclass(frozen=True)
class DeviceClock:
    """Times by events in the stream of a GPU: each is done when the work that was asked for before it is done."""

    device: torch.device

    def now(self) -> Any:
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000.0


def clock_of(device: torch.device) -> Clock:
    return DeviceClock(device) if is_gpu(device) else HostClock()


def _reset_host() -> bool:
    """Return whether the kernel allowed it."""
    try:
        MARK.write_text("5")
    except OSError:
        return False
    return True


def _host_peak() -> float | None:
    """Reading it begins a new phase, so that what can never be set back is not read either."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    peak = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return peak if _reset_host() else None
