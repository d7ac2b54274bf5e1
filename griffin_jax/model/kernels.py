"""Where the kernels of `griffin_jax.model.flash` and `griffin_jax.model.gemv` can be used."""

from __future__ import annotations

import jax

LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest NVIDIA GPUs for which XLA (jax 0.10.2) compiles Triton kernels: those of the Ampere
generation."""


def triton_compiles() -> bool:
    """Whether Triton compiles for every NVIDIA GPU of this process.

    All of them must do, because it is not known which of them a program is for while it is traced. Without any NVIDIA
    GPU the result is true: the program is then for another platform, or is compiled for a GPU that is only described,
    and all GPUs of `griffin_jax.aot.targets` are new enough.
    """
    try:
        gpus = jax.local_devices(backend="cuda")
    except RuntimeError:
        return True
    return all(tuple(map(int, gpu.compute_capability.split("."))) >= LEAST_CAPABILITY for gpu in gpus)
