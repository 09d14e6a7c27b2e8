"""The paged KV cache as explicit pytrees, the input of one step, and the wire form of pages.

How a pool lies in memory is its backend's affair (`Layout`); on the wire all are alike.

Dimension letters: T tokens, S sequences, M pages of a sequence's table, P pages in the pool,
G tokens a page, L layers, K kv heads, H head dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.sharding import Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's work on a flat axis of tokens: those of a sequence lie together, in order.

    Decode (one token of each sequence), prefill, a chunk, and all of them beside each other are the
    same to a step. Tokens past those of the last sequence are padding; so are sequences without
    tokens, which come last.
    """

    tokens: Int[Array | np.ndarray, "T"]
    positions: Int[Array | np.ndarray, "T"]  # of each token in its sequence
    # Where in the pool the token's key and value go: page * G + offset. Those of padding are past
    # the pool, and no two slots are the same.
    slots: Int[Array | np.ndarray, "T"]
    starts: Int[Array | np.ndarray, "S+1"]  # where each sequence's tokens start, and the last's end
    contexts: Int[Array | np.ndarray, "S"]  # tokens of each sequence, those of this step included
    pages: Int[Array | np.ndarray, "S M"]  # page ids; entries past a sequence's last are ignored

    @property
    def num_tokens(self) -> Any:
        """How many of the tokens are real."""
        return self.starts[-1]

    @property
    def num_sequences(self) -> Any:
        """How many of the sequences are real."""
        return jnp.sum(self.counts > 0, dtype=jnp.int32)

    @property
    def counts(self) -> Any:
        """Tokens of each sequence in this step [S]."""
        return self.starts[1:] - self.starts[:-1]

    @property
    def owners(self) -> Int[Array, "T"]:
        """The sequence of each token; of padding the last."""
        return owners(jnp.asarray(self.starts), self.tokens.shape[0])


def owners(starts: Int[Array, "S+1"], num_tokens: int) -> Int[Array, "T"]:
    """See `StepInput`."""
    at = jnp.arange(num_tokens, dtype=jnp.int32)
    found = jnp.searchsorted(starts[1:], at, side="right", method="compare_all")
    return jnp.minimum(found, starts.shape[0] - 2).astype(jnp.int32)


class LayerCache(NamedTuple):
    """One layer's pool of pages: an array for keys and one for values, of four dimensions each.

    In a `Layout` the same as strings, and as shardings where those are asked for.
    """

    k: Any
    v: Any


class Interleaved(NamedTuple):
    """One layer's pool as a single array, in which the key and the value of a head follow each
    other: it has 2 K heads.
    """

    kv: Any


Layer = LayerCache | Interleaved
Cache = tuple[Any, ...]
"""A `Layer` for each layer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a backend's pool lies in memory.

    arrays: the order of each array's dimensions: p pages, g tokens of a page, k heads, h head dim.
    head_dims, page_sizes: what the kernels take, ascending; (): all. Heads are padded with zeros to
    the next of head_dims.
    """

    arrays: Layer
    head_dims: tuple[int, ...] = ()
    page_sizes: tuple[int, ...] = ()

    def head_dim(self, head_dim: int) -> int:
        """What a head of this size takes in the pool.

        Raises:
            ValueError: there is no kernel for it.
        """
        fitting = [size for size in self.head_dims or (head_dim,) if size >= head_dim]
        if not fitting:
            raise ValueError(
                f"head_dim must be at most {self.head_dims[-1]} for these kernels, got {head_dim}"
            )
        return fitting[0]

    def shardings(self, config: ModelConfig, mesh: Mesh | AbstractMesh, rules: Rules) -> Layer:
        """Those of a layer's arrays.

        Raises:
            ValueError: the kv heads cannot be split as the rules ask.
        """

        def one(letters: str):
            axes = tuple("kv_heads" if letter == "k" else None for letter in letters)
            return rules.sharding(mesh, axes, [config.num_kv_heads] * len(axes))

        return jax.tree.map(one, self.arrays)

    def zeros(self, config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike) -> Layer:
        """An empty pool for one layer.

        Raises:
            ValueError: there are no kernels for such pages or heads.
        """
        if self.page_sizes and page_size not in self.page_sizes:
            raise ValueError(
                f"page_size must be one of {', '.join(map(str, self.page_sizes))} for these "
                f"kernels, got {page_size}"
            )
        heads = config.num_kv_heads * self._parts
        head_dim = self.head_dim(config.head_dim)
        sizes = {"p": num_pages, "k": heads, "g": page_size, "h": head_dim}
        shapes = jax.tree.map(lambda letters: tuple(sizes[x] for x in letters), self.arrays)
        return type(self.arrays)(*(jnp.zeros(shape, dtype) for shape in shapes))

    def append(
        self, k: Float[Array, "T K H"], v: Float[Array, "T K H"], layer: Layer, step: StepInput
    ) -> Any:
        """The layer with a step's keys and values in; those of padding are dropped."""
        page, offset = jnp.divmod(jnp.asarray(step.slots), self._size("g", layer))
        return self._scatter(layer, {"p": page, "g": offset}, "tkh", k, v)

    def write(self, layer: Layer, pages: Int[Array, "M"], wire: Float[Array, "T K 2 H"]) -> Any:
        """The layer with M whole pages replaced; ids outside of the pool are dropped. A pool that
        has several of each head (`Rules.kv_copies`) gets it as often.
        """
        num_pages = self._size("p", layer)
        pages = _or_past(pages, (pages >= 0) & (pages < num_pages), num_pages)
        copies = self._size("k", layer) // self._parts // wire.shape[1]
        wire = jnp.repeat(wire, copies, axis=1)
        paged = wire.reshape(pages.shape[0], -1, *wire.shape[1:])
        return self._scatter(layer, {"p": pages}, "pgkh", paged[..., 0, :], paged[..., 1, :])

    def gather(
        self, layer: Layer, pages: Int[Array, "*S M"]
    ) -> tuple[Float[Array, "*S T K H"], Float[Array, "*S T K H"]]:
        """Keys and values of the pages' tokens, in order, T = M * G; heads as wide as they lie."""

        def take(array: Array, axis: int) -> Array:
            return jnp.take(array, pages.reshape(-1), axis=axis, mode="clip")

        return self._tokens(layer, take, pages.shape)

    def read(
        self, layer: Layer, pages: Int[Array, "M"]
    ) -> tuple[Float[Array, "T K H"], Float[Array, "T K H"]]:
        """As `gather`, of a few pages: by slices, since for a gather XLA for TPU brings the whole
        pool into fast memory, or lays it out anew.
        """

        def take(array: Array, axis: int) -> Array:
            slices = [jax.lax.dynamic_slice_in_dim(array, page, 1, axis) for page in pages]
            return jnp.concatenate(slices, axis)

        return self._tokens(layer, take, pages.shape)

    def _tokens(
        self, layer: Layer, take: Callable[[Array, int], Array], shape: tuple[int, ...]
    ) -> tuple[Array, Array]:
        """Keys and values of the pages that `take` takes of an array. shape: of the pages."""

        def one(order: str, array: Array) -> Array:
            taken = take(array, order.index("p"))
            paged = taken.transpose([order.index(letter) for letter in "pgkh"])
            return paged.reshape(*shape[:-1], -1, *paged.shape[2:])

        parts = [one(order, array) for order, array in zip(self.arrays, layer, strict=True)]
        if isinstance(self.arrays, Interleaved):
            return parts[0][..., ::2, :], parts[0][..., 1::2, :]
        return parts[0], parts[1]

    @property
    def _parts(self) -> int:
        """Heads of an array that each kv head takes."""
        return 2 if isinstance(self.arrays, Interleaved) else 1

    def _size(self, letter: str, layer: Layer) -> int:
        return layer[0].shape[self.arrays[0].index(letter)]

    def _scatter(self, layer: Layer, at: Mapping[str, Array], dims: str, *kv: Array) -> Any:
        """The layer with these keys and values at these indices. dims: theirs, where t stands for
        all of `at` together.
        """
        values = [pad_heads(each, self._size("h", layer)) for each in kv]
        if isinstance(self.arrays, Interleaved):
            both = jnp.stack(values, axis=-2)
            values = [both.reshape(*both.shape[:-3], -1, both.shape[-1])]
        parts = zip(layer, self.arrays, values, strict=True)
        return type(self.arrays)(*(_put(*each, at, dims) for each in parts))


def abstract(
    config: ModelConfig,
    layout: Layout,
    num_pages: int,
    page_size: int,
    dtype: DTypeLike,
    sharding: Layer | None = None,
) -> Cache:
    """The pool of every layer, as shapes; `sharding` as `Layout.shardings` gives it.

    Raises:
        ValueError: as `Layout.zeros`.
    """
    layer = jax.eval_shape(lambda: layout.zeros(config, num_pages, page_size, dtype))
    if sharding is not None:
        layer = type(layer)(
            *(
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=how)
                for leaf, how in zip(layer, sharding, strict=True)
            )
        )
    return (layer,) * config.num_layers


def allocate(pool: Cache) -> Cache:
    """A pool like that of `abstract`, zeroed."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, pool)

    def zeros() -> Cache:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), pool)

    return jax.jit(zeros, out_shardings=shardings)()


def read_pages(
    config: ModelConfig, layout: Layout, cache: Cache, pages: Int[Array, "M"]
) -> Float[Array, "L T K 2 H"]:
    """Copies pages out in the wire form: token-major, K and V side by side, T = M * G. config: the
    model's own, with each kv head once.
    """

    def one_layer(layer: Layer) -> Array:
        both = jnp.stack(layout.read(layer, pages), axis=2)
        return both[:, :: both.shape[1] // config.num_kv_heads, :, : config.head_dim]

    return jnp.stack([one_layer(layer) for layer in cache])


def write_pages(
    layout: Layout, cache: Cache, pages: Int[Array, "M"], wire: Float[Array, "L T K 2 H"]
) -> Cache:
    """Writes what `read_pages` gave into other pages, of whatever layout that was. Page ids outside
    the pool are dropped.
    """
    layers = zip(cache, wire, strict=True)
    return tuple(layout.write(layer, pages, tokens) for layer, tokens in layers)


def pad_heads(x: Float[Array, "... H"], head_dim: int) -> Float[Array, "... H2"]:
    """Heads with zeros behind them, up to head_dim: they add nothing to a product of heads."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, head_dim - x.shape[-1])])


def _or_past(pages: Int[Array, "T"], real: Array, num_pages: int) -> Int[Array, "T"]:
    """The pages, or where one is not real a place past the pool, which a scatter drops: another one
    for each, since the scatter is told that no two places are the same.
    """
    past = num_pages + jnp.arange(pages.shape[0], dtype=jnp.int32)
    return jnp.where(real, pages, past)


def _put(array: Array, order: str, values: Array, at: Mapping[str, Array], dims: str) -> Array:
    """The array, whose dimensions are `order`, with values, whose are `dims`, at these indices, no
    two of which are the same.

    Told so, XLA for GPU stores the values; else it stores bfloat16 by compare and swap, one by one.
    """
    index: list[Any] = [at.get(letter, slice(None)) for letter in order]
    if len(at) > 1:
        # As NumPy has it: what two indices pick stays in their place if they are neighbours, and
        # comes first if they are not.
        first, last = sorted(order.index(letter) for letter in at)
        others = [letter for letter in order if letter not in at]
        others.insert(first if last == first + 1 else 0, "t")
        order = "".join(others)
    values = values.transpose([dims.index(letter) for letter in order]).astype(array.dtype)
    return array.at[tuple(index)].set(values, mode="drop", unique_indices=True)
