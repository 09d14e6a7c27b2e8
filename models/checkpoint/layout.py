"""From the [out, in] matrices of PyTorch and GGUF to our weights, part by part; and back."""

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from numpy.typing import NDArray

Index = tuple[slice, ...]

# The last part of a weight's path -> how its source, once heads and head_dim are two dimensions, is
# transposed to ours; and which source dimension is those two in one.
_ORDER: dict[str, tuple[tuple[int, ...], int | None]] = {
    "q": ((2, 0, 1), 0),
    "k": ((2, 0, 1), 0),
    "v": ((2, 0, 1), 0),
    "o": ((1, 2, 0), 1),
    "q_bias": ((0, 1), 0),
    "k_bias": ((0, 1), 0),
    "v_bias": ((0, 1), 0),
    "gate": ((1, 0), None),
    "up": ((1, 0), None),
    "down": ((1, 0), None),
    "head": ((1, 0), None),
    "embed": ((0, 1), None),
    "scale": ((0,), None),
}


def load(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Callable[[Index], NDArray]],
) -> dict[str, jax.Array]:
    """Makes every weight in its sharding, each device's part read on its own.

    read: path -> a function of an index into the source tensor. It is called once a weight, in
    order, so that it may hold on to one tensor's values.
    """
    arrays = {}
    for path, leaf in abstract.items():
        source = read(path)

        def part(index: Index | None, path=path, leaf=leaf, source=source) -> NDArray:
            assert index is not None  # JAX asks for nothing less than a part
            return take_part(path, leaf.shape, index, source).astype(leaf.dtype)

        arrays[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
    return arrays


def source_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the source tensor of a weight of ours."""
    order, merged = _ORDER[path.rsplit(".", 1)[-1]]
    split = [shape[order.index(dim)] for dim in range(len(order))]
    if merged is not None:
        split[merged : merged + 2] = [split[merged] * split[merged + 1]]
    return tuple(split)


def take_part(
    path: str, shape: tuple[int, ...], index: Index, source: Callable[[Index], NDArray]
) -> NDArray:
    """The part `index` of a weight of ours, reading that part of its source only."""
    order, merged = _ORDER[path.rsplit(".", 1)[-1]]
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    split = [bounds[order.index(dim)] for dim in range(len(order))]
    sizes = [stop - start for start, stop in split]
    if merged is not None:
        head_dim = sizes[merged + 1]
        if head_dim != shape[order.index(merged + 1)]:
            raise ValueError(f"weight {path!r} cannot be split along head_dim")
        start, stop = split[merged]
        split[merged : merged + 2] = [(start * head_dim, stop * head_dim)]
    part = source(tuple(slice(start, stop) for start, stop in split))
    return part.reshape(sizes).transpose(order)


def to_source(path: str, value: NDArray) -> NDArray:
    """The source tensor of a whole weight of ours: what `take_part` did, undone."""
    order, _ = _ORDER[path.rsplit(".", 1)[-1]]
    split = value.transpose([order.index(dim) for dim in range(len(order))])
    return np.ascontiguousarray(split.reshape(source_shape(path, value.shape)))


def check_keys(where: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ValueError that names what is missing or unknown."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    faults = [
        f"{len(names)} weights {what}: {', '.join(names[:8])}{', ...' if names[8:] else ''}"
        for what, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if faults:
        raise ValueError(f"checkpoint {where}: {'; '.join(faults)}")


def check_shape(where: str, name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    """Raises ValueError if the tensor `name` has another shape than the config implies."""
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"checkpoint {where}: tensor {name!r} has shape {tuple(found)}, "
            f"the config asks for {tuple(expected)}"
        )
