"""How the named dimensions of weights and caches lie on a mesh of devices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]
"""One logical name (a field of `Rules`) or None for each dimension of an array."""

MESH_AXES = ("tensor",)
"""Of every mesh that `make_mesh` makes."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The mesh axis that each logical axis is split over; None leaves it whole.

    The default is tensor parallelism: a device holds some heads, with their keys and values, and a
    part of the mlp and of the vocabulary. Each block then needs two all-reduces.
    """

    vocab: str | None = "tensor"
    embed: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
            ValueError: an axis is unknown, or two of them fall on one mesh axis.
        """
        known = [field.name for field in fields(self)]
        unknown = [axis for axis in axes if axis is not None and axis not in known]
        if unknown:
            raise ValueError(f"logical axes {unknown} of {axes} are not among {known}")
        parts = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [part for part in parts if part is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {axes} put two dimensions on one mesh axis: {parts}")
        return PartitionSpec(*parts)

    def kv_copies(self, mesh: Mesh | AbstractMesh, num_kv_heads: int) -> int:
        """How many of each kv head, side by side, make up a number that divides by the mesh.

        The least. Each q head then has its kv head, or a copy of it, on its own device: kv heads
        that serve g q heads in a row each become so many more that serve g / copies each, which is
        a whole number wherever the q heads divide by the mesh.
        """
        devices = mesh.shape.get(self.kv_heads or "", 1)
        return math.lcm(num_kv_heads, devices) // num_kv_heads

    def without_copies(self, mesh: Mesh | AbstractMesh, num_kv_heads: int) -> "Rules":
        """The rules for what has each kv head once: whole on every device if they do not divide."""
        copied = self.kv_copies(mesh, num_kv_heads) > 1
        return replace(self, kv_heads=None) if copied else self

    def sharding(
        self, mesh: Mesh | AbstractMesh, axes: Axes, shape: Sequence[int]
    ) -> NamedSharding:
        """The sharding of an array of this shape.

        Raises:
            ValueError: as `spec`, or the mesh lacks an axis, or a dimension does not divide.
        """
        spec = self.spec(axes)
        for axis, part, size in zip(axes, spec, shape, strict=True):
            if part is None:
                continue
            if part not in mesh.shape:
                raise ValueError(f"mesh has axes {tuple(mesh.shape)}, not {part!r} for {axis!r}")
            if size % mesh.shape[part]:
                raise ValueError(
                    f"{axis} of size {size} cannot be split evenly over the {mesh.shape[part]} "
                    f"devices of mesh axis {part!r}"
                )
        return NamedSharding(mesh, spec)


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh with the one axis of `MESH_AXES` over these `jax.Device`s, in this order.

    The axis type is stated: JAX's own default for it has changed between versions.
    """
    if not devices:
        raise ValueError("a mesh needs at least 1 device, got none")
    return Mesh(np.asarray(devices), MESH_AXES, axis_types=(AxisType.Auto,))
