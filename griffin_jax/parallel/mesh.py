"""Meshes: devices arranged along two axes, one of which divides the batch and the other the model.

    mesh = make_mesh(data=2, model=4)            eight devices, each with a quarter of the model and half of the batch
    llm = griffin_jax.load(source, mesh=mesh)

`griffin_jax.model.sharding` says what is divided along each axis. No function has to be given the mesh: it is found
from the model's arrays, even while they are traced.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
"""The axis along which sequences are divided."""

MODEL_AXIS = "model"
"""The axis along which heads, neurons and vocabulary are divided."""

AXES = (DATA_AXIS, MODEL_AXIS)


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of both axes from a text such as `data=2,model=4`; an axis that is not named has size 1.

    Raises:
        ValueError: the text is malformed.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise ValueError(f"a mesh has the axes {' and '.join(AXES)}, such as data=2,model=4; got {text!r}")
        if name in sizes:
            raise ValueError(f"the mesh {text!r} names {name} twice")
        if not (size.isascii() and size.isdecimal() and int(size)):
            raise ValueError(f"the size of a mesh's axis is a whole number of at least 1, got {part.strip()!r}")
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """A mesh of the first data x model devices; devices of one process are neighbours along `MODEL_AXIS`.

    Args:
        data: number of parts that batches are divided into.
        model: number of parts that the model is divided into.

    Raises:
        ValueError: there are too few devices, or there are several processes with more devices than the mesh takes.
    """
    devices, wanted = jax.devices(), data * model
    if wanted > len(devices):
        raise ValueError(
            f"a mesh of data={data},model={model} takes {wanted} devices, there are {len(devices)}"
            f" ({devices[0].platform}); of CPUs, XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes more"
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"a mesh of several processes takes all of their {len(devices)} devices, data={data},model={model} are"
            f" {wanted}"
        )
    return Mesh(np.asarray(devices[:wanted]).reshape(data, model), AXES)


def checked_mesh(mesh: Mesh) -> Mesh:
    """The same mesh with both axes, `data` first; an axis that it lacks is added with size 1.

    Raises:
        ValueError: the mesh has an axis of another name.
    """
    if unknown := sorted(set(mesh.axis_names) - set(AXES)):
        raise ValueError(
            f"the mesh has the axes {', '.join(map(repr, mesh.axis_names))}; {', '.join(map(repr, unknown))} means"
            f" nothing here: give it axes named {' and '.join(map(repr, AXES))}"
        )
    devices = np.asarray(mesh.devices)
    if mesh.axis_names == AXES[::-1]:
        devices = devices.T
    return Mesh(devices.reshape([axis_size(mesh, axis) for axis in AXES]), AXES)


def mesh_of(array: Any) -> Mesh | AbstractMesh | None:
    """The mesh that an array is on, even while the array is traced; None if it is on one device.

    The result is also None inside `jax.shard_map` over all axes, where each device has a separate array.
    """
    sharding = jax.typeof(array).sharding if isinstance(array, Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size <= 1:
        return None
    return None if set(sharding.mesh.axis_types) == {AxisType.Manual} else sharding.mesh


def axis_size(mesh: Mesh | AbstractMesh | None, axis: str) -> int:
    """Number of devices along an axis; 1 if there is no mesh, or if it lacks the axis."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def dividing(mesh: Mesh | AbstractMesh | None, axis: str, size: int) -> str | None:
    """An entry of a `PartitionSpec`: `axis` if it divides a size evenly among several devices, else None."""
    devices = axis_size(mesh, axis)
    return axis if devices > 1 and size % devices == 0 else None


def local_sequences(mesh: Mesh | AbstractMesh | None, batch: int) -> int:
    """Number of sequences of a batch on each device."""
    return batch // axis_size(mesh, DATA_AXIS) if dividing(mesh, DATA_AXIS, batch) else batch


def over_data(mesh: Mesh | AbstractMesh | None, array: Any) -> Any:
    """An array (B, ...) divided along `DATA_AXIS`, if that divides B evenly; otherwise the array unchanged."""
    if mesh is None or dividing(mesh, DATA_AXIS, array.shape[0]) is None:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))


def to_host(tree: Any) -> Any:
    """The tree with its arrays as NumPy arrays, each whole on every process."""

    def whole(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return jax.tree.map(whole, tree)
