"""What the machine does: bandwidth of a copy, rate of a matrix product. Prints JSON.

python -m hrm_text.throughput.rates BYTES     # in an environment with torch; BYTES as many as the weights have
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from hrm_text.throughput.floor import Rates


def seconds_of(work: Callable[[], object], device: str, patience: float = 1.0) -> float:
    """The shortest of as many runs as `patience` seconds hold: a floor must not rise with what else runs here."""
    shortest, end, runs = float("inf"), time.perf_counter() + patience, 0
    while runs < 5 or time.perf_counter() < end:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        shortest, runs = min(shortest, time.perf_counter() - began), runs + 1
    return shortest


def measure(size: int) -> Rates:
    """Rates of the device that an engine takes here: the first GPU, else the processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Weights that fit a cache are read from it: the copy has their size. The product is large enough to be bound by
    # arithmetic; processors without bf16 units multiply float32 faster, and an engine may do that.
    source = torch.ones(max(size, 1 << 20) // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = seconds_of(lambda: target.copy_(source), device)
    n = 8192 if device == "cuda" else 1024
    fastest = 0.0
    for dtype in (torch.bfloat16, *((torch.float32,) if device == "cpu" else ())):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        fastest = max(fastest, 2 * n**3 / seconds_of(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    return Rates(2 * source.numel() * source.element_size() / copied, fastest, name)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(named, platform.machine())
    except OSError:
        return platform.machine()


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1])))))
