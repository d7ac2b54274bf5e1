"""The chips that `griffin-jax compile` compiles for: published figures, and what XLA needs to know about each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA needs to know about an NVIDIA GPU to compile for it, besides memory size and bandwidth.

    Attributes:
        capability: CUDA compute capability.
        cores: number of enabled streaming multiprocessors.
        lanes: float32 units of each multiprocessor.
        threads: the most resident threads of each multiprocessor.
        shared_memory: bytes of shared memory of each multiprocessor.
        block_shared_memory: bytes of shared memory that one block may opt in to.
        l2_cache: bytes of L2 cache.
        clock: boost clock, GHz.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared_memory: int
    block_shared_memory: int
    l2_cache: int
    clock: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip with its published figures.

    Attributes:
        name: its name, as its vendor writes it.
        memory: bytes of device memory, as the driver reports them if it does.
        bandwidth: bytes per second that the device memory delivers.
        gpu: more about an NVIDIA GPU; None for a TPU.
        generation: generation of a TPU, as libtpu names it; None for a GPU.
    """

    name: str
    memory: int
    bandwidth: float
    gpu: Gpu | None = None
    generation: str | None = None


# Sources. NVIDIA: the data sheets of H100, H200, A100, L40 and GeForce RTX 4090 for memory and bandwidth; the
# whitepapers of Ampere GA100, Ada and Hopper for multiprocessors, caches and clocks; the CUDA C++ programming guide,
# table of technical specifications per compute capability, for threads and shared memory. Google: the pages of
# TPU v5e and TPU v6e in the Cloud TPU documentation. Memory of the GPUs is what CUDA reports: H100, H200 and A100
# as recorded in XLA's own specifications of them.
TARGETS: Mapping[str, Chip] = MappingProxyType({
    "h100": Chip(
        "NVIDIA H100 SXM", 84_942_979_072, 3.35e12, Gpu((9, 0), 132, 128, 2048, 233_472, 232_448, 50 << 20, 1.98)
    ),
    "h200": Chip(
        "NVIDIA H200", 151_397_597_184, 4.8e12, Gpu((9, 0), 132, 128, 2048, 233_472, 232_448, 50 << 20, 1.98)
    ),
    "a100": Chip(
        "NVIDIA A100 SXM 80 GB", 85_100_068_864, 2.04e12, Gpu((8, 0), 108, 64, 2048, 167_936, 166_912, 40 << 20, 1.41)
    ),
    "l40": Chip(
        "NVIDIA L40", 47_810_936_832, 8.64e11, Gpu((8, 9), 142, 128, 1536, 102_400, 101_376, 96 << 20, 2.49)
    ),
    "rtx4090": Chip(
        "NVIDIA GeForce RTX 4090", 25_757_220_864, 1.008e12,
        Gpu((8, 9), 128, 128, 1536, 102_400, 101_376, 72 << 20, 2.52),
    ),
    "tpu-v5e": Chip("TPU v5e", 16 << 30, 8.19e11, generation="v5e"),
    "tpu-v6e": Chip("TPU v6e", 32 << 30, 1.64e12, generation="v6e"),
})  # fmt: skip


SLICES: Mapping[int, str] = MappingProxyType({1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8"})
"""The numbers of TPUs that can work together, with the smallest slice of at least that many of which libtpu has a
description."""


def target(name: str) -> Chip:
    """The chip of this name, in upper or lower case.

    Raises:
        ValueError: no chip has this name.
    """
    try:
        return TARGETS[name.lower()]
    except KeyError:
        raise ValueError(f"there is no target {name!r}; there are {', '.join(TARGETS)}") from None


def topology(chip: Chip, devices: int) -> str:
    """JAX's name for the topology of this many chips of a kind; if a TPU slice has more, its first chips are used.

    Raises:
        ValueError: the chip does not come in this number.
    """
    if chip.generation is None:
        return f"1x1x{devices}"
    if devices not in SLICES:
        *others, most = map(str, SLICES)
        raise ValueError(f"{chip.name} works in slices of {', '.join(others)} or {most} devices, not {devices}")
    return f"{chip.generation}:{SLICES[devices]}"


def gpu_target_config(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto for an NVIDIA GPU, in text form.

    Raises:
        ValueError: the chip is not a GPU.
    """
    gpu = chip.gpu
    if gpu is None:
        raise ValueError(f"{chip.name} is not a GPU")
    major, minor = gpu.capability
    # The limits without a field above are the same for every GPU since 2012.
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {chip.memory}
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.block_shared_memory}
  shared_memory_per_core: {gpu.shared_memory}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {gpu.threads}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.name}"
"""
