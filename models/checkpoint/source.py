"""From the tensors of PyTorch and GGUF, which have matrices as [out, in], to our weights, part by
part; and back. How a tensor lies follows from the declaration of its weight.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from numpy.typing import NDArray

from models.weights import Weight

Index = tuple[slice, ...]


def load(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    weights: Mapping[str, Weight],
    read: Callable[[Weight], Callable[[Index], NDArray]],
) -> dict[str, jax.Array]:
    """Makes every weight in its sharding, each device's part read on its own.

    read: gives a function of an index into the weight's tensor. It is called once a weight, in
    order, so that it may hold on to one tensor's values.
    """
    arrays = {}
    for path, leaf in abstract.items():
        weight = weights[path]
        source = read(weight)

        def part(index: Index | None, weight=weight, leaf=leaf, source=source) -> NDArray:
            assert index is not None  # JAX asks for nothing less than a part
            return take_part(weight, index, source).astype(leaf.dtype)

        arrays[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
    return arrays


def source_shape(weight: Weight) -> tuple[int, ...]:
    """The shape of a weight's tensor."""
    order, merged = _order(weight)
    split = [weight.shape[dim] for dim in order]
    if merged is not None:
        split[merged : merged + 2] = [split[merged] * split[merged + 1]]
    return tuple(split)


def take_part(weight: Weight, index: Index, source: Callable[[Index], NDArray]) -> NDArray:
    """The part `index` of a weight, reading that part of its tensor only."""
    order, merged = _order(weight)
    bounds = [part.indices(size)[:2] for part, size in zip(index, weight.shape, strict=True)]
    split = [bounds[dim] for dim in order]
    sizes = [stop - start for start, stop in split]
    if merged is not None:
        head_dim = sizes[merged + 1]
        if head_dim != weight.shape[order[merged + 1]]:
            raise ValueError(f"weight {weight.path!r} cannot be split along head_dim")
        start, stop = split[merged]
        split[merged : merged + 2] = [(start * head_dim, stop * head_dim)]
    part = source(tuple(slice(start, stop) for start, stop in split))
    return part.reshape(sizes).transpose(np.argsort(order))


def to_source(weight: Weight, value: NDArray) -> NDArray:
    """The tensor of a whole weight: what `take_part` did, undone."""
    order, _ = _order(weight)
    return np.ascontiguousarray(value.transpose(order).reshape(source_shape(weight)))


def _order(weight: Weight) -> tuple[list[int], int | None]:
    """Which of our dimensions each dimension of the tensor is, once heads and head_dim are apart;
    and where in it those two are one.
    """
    dims = list(range(len(weight.axes)))
    order = dims[weight.num_inputs :] + dims[: weight.num_inputs]
    axes = [weight.axes[dim] for dim in order]
    merged = axes.index("head_dim") - 1 if "head_dim" in axes else -1
    return order, merged if merged >= 0 else None


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
