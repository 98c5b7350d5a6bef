"""What an op has to move and to compute, whoever runs it, and how fast this machine copies.

A kernel at the roofline takes bytes / copy bandwidth. The bytes are those of a fused op: every operand read
once, every result written once. A provider that moves more only looks slower.

    python -m bench.roofline    how fast this machine copies, and what that allows one thread of its CPU:
                                writes bench/results/roofline-MAKER.json, which `bench.report` shows
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.shapes import CLAIM_ADVANTAGE, CLAIM_LATENT, CLAIM_POOL, AdvantageCase, PoolCase

RESULTS = Path(__file__).parent / "results"
OPERATIONS_PER_NORMAL = 35
"""Philox4x32-10: 10 rounds of 8 operations for 4 normals; Box-Muller: log, root, sine, cosine for 2."""


@dataclass(frozen=True)
class Traffic:
    """Per element of a latent (per token and feature, per reward and step)."""

    reads: int
    """Operands in the storage dtype, each read once."""
    writes: int
    """Results in the storage dtype."""
    operations: int
    """Arithmetic, fused multiply-adds counted as two."""


TRAFFIC = {
    "normal_noise": Traffic(0, 1, OPERATIONS_PER_NORMAL),
    "gaussian_step": Traffic(2, 1, 9),
    "gaussian_step, guided": Traffic(3, 2, 12),
    "gaussian_step_": Traffic(2, 3, 9),
    "step_log_prob": Traffic(3, 0, 7),
    "step_log_prob, backward": Traffic(3, 1, 6),
    "ppo_loss": Traffic(2, 0, 6),
    "ppo_loss, backward": Traffic(2, 1, 7),
    "gae": Traffic(2, 2, 9),
}
"""Without a given noise, which is one float32 read more, and without a reference, one read in the dtype."""


@dataclass(frozen=True)
class Cost:
    """What one call moves and computes."""

    bytes: int
    operations: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations)

    def gigabytes_per_second(self, seconds: float) -> float:
        return self.bytes / seconds / 1e9


def elementwise(
    op: str, elements: int, dtype: torch.dtype, *, noise: str = "none", reference: bool = False
) -> Cost:
    """Cost of an op of TRAFFIC.

    Args:
        op: a key of TRAFFIC.
        elements: B N, or B T M.
        dtype: of storage.
        noise: "given" is read as float32, "drawn" is computed, "none" is not there.
        reference: whether a reference output is read for its KL.

    Raises:
        ValueError: for another `noise`.
    """
    if noise not in ("given", "drawn", "none"):
        raise ValueError(f"noise={noise!r}; known: 'given', 'drawn', 'none'")
    # The float32 result of normal_noise is the only one that has no storage dtype.
    itemsize = 4 if op == "normal_noise" else dtype.itemsize
    traffic = TRAFFIC[op]
    size = (traffic.reads + traffic.writes + reference) * itemsize + 4 * (noise == "given")
    operations = traffic.operations + 3 * reference + OPERATIONS_PER_NORMAL * (noise == "drawn")
    return Cost(elements * size, elements * operations)


def value_pool(case: PoolCase, dtype: torch.dtype) -> Cost:
    """One read of the features; queries in, pooled features out, both float32.

    Per feature and head: the score's and the sum's multiply-add. Per feature: the square of the norm and the
    product with its weight.
    """
    tokens = case.batch * case.tokens * case.features
    small = case.batch * case.heads * case.features
    return Cost(tokens * dtype.itemsize + 2 * 4 * small, tokens * (4 * case.heads + 3))


def value_pool_backward(case: PoolCase, dtype: torch.dtype) -> Cost:
    """One read of the features and one write of their gradient; twice the products of the forward pass."""
    tokens = case.batch * case.tokens * case.features
    small = case.batch * case.heads * case.features
    return Cost(2 * tokens * dtype.itemsize + 4 * 4 * small, tokens * (8 * case.heads + 6))


def normalized_advantages(case: AdvantageCase, dtype: torch.dtype) -> Cost:
    """Values in, raw advantages and targets out per head, one advantage per step; the raw are read again.

    Two passes are the least: no advantage can be scaled before all of them are known.
    """
    per_step = case.batch * case.steps
    heads = per_step * case.rewards
    size = 4 * heads + per_step + case.batch * case.rewards
    return Cost(size * dtype.itemsize, 20 * heads + 4 * per_step)


def cache_bytes(device: torch.device) -> int:
    """The largest cache between the arithmetic and the memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_sysfs_bytes(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 << 20)


def _sysfs_bytes(path: Path) -> int:
    text = path.read_text(encoding="utf-8").strip()
    return int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0)


def copy_bandwidth(device: torch.device, *, repeats: int = 9, num_bytes: int | None = None) -> float:
    """Bytes per second of a torch copy beyond the caches, read and written both counted; the median.

    On a CPU it is one thread's: set torch.set_num_threads(1) first.

    Args:
        device: of both buffers.
        repeats: timed copies.
        num_bytes: of one buffer. None: eight times the cache, 64 MiB at least, 1 GiB at most.
    """
    if num_bytes is None:
        num_bytes = min(max(8 * cache_bytes(device), 64 << 20), 1 << 30)
    source = torch.ones(math.ceil(num_bytes / 4), device=device)
    target = torch.zeros_like(source)
    seconds = [_copy_seconds(source, target) for _ in range(repeats + 2)][2:]
    return 2 * source.nbytes / statistics.median(seconds)


def multiply_adds_per_second(*, channels: int = 256, size: int = 32, repeats: int = 9) -> float:
    """Of a library's convolution in float32 by one CPU thread, which is near the most; the fastest.

    Not of a product of matrices: torch's library for those takes half of the registers' width where the
    processor is another maker's.
    """
    image, kernel = torch.ones(1, channels, size, size), torch.ones(channels, channels, 3, 3)
    seconds = []
    for _ in range(repeats):
        begin = time.thread_time()
        torch.conv2d(image, kernel)
        seconds.append(time.thread_time() - begin)
    return kernel.numel() * (size - 2) ** 2 / min(seconds)


def least_seconds(bandwidth: float, multiply_adds: float) -> dict[tuple[str, str], tuple[float, float]]:
    """(op, dtype) at the claim's size -> the least time from memory beyond the caches, and of the arithmetic.

    Every operand is read once and every result written once; ppo_loss is forward and backward of given
    noise, which a second pass would have to find in a cache.
    """
    bounds = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        pool = value_pool(CLAIM_POOL, dtype)
        products = CLAIM_POOL.batch * CLAIM_POOL.tokens * CLAIM_POOL.features * (2 * CLAIM_POOL.heads + 1)
        loss = elementwise("ppo_loss, backward", CLAIM_LATENT.elements, dtype, noise="given")
        bounds["value_pool", name] = pool.bytes / bandwidth, products / multiply_adds
        bounds["ppo_loss", name] = loss.bytes / bandwidth, loss.operations / 2 / multiply_adds
    chains = elementwise("gae", math.prod(CLAIM_ADVANTAGE.shape), torch.float32)
    bounds["gae", "float32"] = chains.bytes / bandwidth, chains.operations / 2 / multiply_adds
    return bounds


def _copy_seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    if source.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    # As the ops are timed: another process on the core must not count.
    begin = time.thread_time()
    target.copy_(source)
    return time.thread_time() - begin


def measure() -> dict[str, Any]:
    """Rates of one CPU thread, and milliseconds that they allow each op at the claim's size."""
    device = torch.device("cpu")
    latents = CLAIM_LATENT.elements * torch.float32.itemsize
    bandwidths = {"memory": copy_bandwidth(device), "cache": copy_bandwidth(device, num_bytes=latents)}
    rate = multiply_adds_per_second()
    least = {place: least_seconds(bandwidth, rate) for place, bandwidth in bandwidths.items()}
    return {
        "date": machine.today(),
        "label": machine.label(device),
        "torch": torch.__version__,
        "gigabytes_per_second": {place: value / 1e9 for place, value in bandwidths.items()},
        "latents_mebibytes": latents / 2**20,
        "giga_multiply_adds_per_second": rate / 1e9,
        "least_milliseconds": [
            {
                "op": op,
                "dtype": dtype,
                **{place: 1e3 * bounds[op, dtype][0] for place, bounds in least.items()},
                "arithmetic": 1e3 * arithmetic,
            }
            for (op, dtype), (_, arithmetic) in least["memory"].items()
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The least times, as Markdown."""
    lines = ["| at least, ms | from memory | from the cache | arithmetic |", "|---|---|---|---|"]
    lines += [
        f"| `{row['op']}`, {row['dtype']} | "
        + " | ".join(f"{row[bound]:.2f}" for bound in ("memory", "cache", "arithmetic"))
        + " |"
        for row in result["least_milliseconds"]
    ]
    speeds = result["gigabytes_per_second"]
    note = (
        f"One thread of {result['label']}, torch {result['torch']}, {result['date']}: a copy moves "
        f"{speeds['memory']:.1f} GB/s beyond the caches and {speeds['cache']:.0f} GB/s from "
        f"{result['latents_mebibytes']:g} MiB, the latents of the tables above; a library's convolution in "
        f"float32 does {result['giga_multiply_adds_per_second']:.1f} G multiply-adds/s. Every "
        "operand is read and every result written once; `ppo_loss` is forward and backward of given noise. "
        "The products of `value_pool` are those of float32 for bfloat16 features too: queries and weights "
        "keep their digits. `python -m bench.roofline` measures it."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        bandwidth = copy_bandwidth(torch.device("cuda"))
        print(f"a copy on cuda moves {bandwidth / 1e9:.1f} GB/s")
        return
    result = measure()
    path = RESULTS / f"roofline-{machine.maker()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
