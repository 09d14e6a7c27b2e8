"""The programs of an engine: its jitted functions, and the arrays that they take, as shapes.

Nothing is allocated here and nothing runs, so the devices need not be there: those of a described
topology will do, for which a program can be compiled but not run.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from kairos_jax.engine import calls, lanes
from kairos_jax.engine.calls import Call, Read, Score, Step, Write
from kairos_jax.engine.lanes import Fill
from models import kv_cache, sampling
from models.config import ModelConfig
from models.ops import KERNELS, on_mesh
from models.params import abstract_packed, pack_config
from models.sharding import Rules
from models.transformer import all_finite, hidden_states, last_states, logits
from schedulers.ledger.instance import Limits, Role

BLOCK_PAGES = 4
"""Pages of one block in wire form: blocks of one size, so that one compiled gather and one scatter
serve prompts of every length."""


def bucket_sizes(limit: int, coarse: int = 4) -> tuple[int, ...]:
    """1, 2, 4, 6, 8, 12, 16, 24, ... up to and including `limit`: padding wastes a third at most
    from 4 on, for two compilations a doubling. Below `coarse` there is one a doubling. What is
    hardly less than `limit` is left out where no more is wasted without it.
    """
    sizes, size = {limit}, 1
    while size < limit:
        sizes |= {size, size + size // 2 if size >= coarse else size}
        size *= 2
    steps = sorted(size for size in sizes if size <= limit)
    if len(steps) > 2 and steps[-2] + steps[-2] // 16 >= limit and limit <= 1.5 * steps[-3]:
        del steps[-2]
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """least: tokens of the smallest step. least_chunk: of an engine that only prefills; of prompts
    fewer are rarely left. free: up to which padding takes hardly any time, so that smaller steps
    are for decodes alone. coarse: see `bucket_sizes`. blocks: see `Shapes`.
    """

    least: int
    least_chunk: int
    free: int
    coarse: int
    blocks: tuple[int, ...]


# Each shape delays the start: by a second or two on a CPU, by half a minute on an accelerator. On
# those a step of 64 tokens, and on most one of 256, reads the weights for longer than it computes,
# so padding is free. They copy a block sooner than the host calls a program; a CPU takes ten times
# as long as the call. Sixteen blocks a call take the host no less for each block than four.
_ON_CPU = _Sizes(1, 16, 1, 16, (1,))
_ON_ACCELERATOR = _Sizes(64, 256, 256, 1024, (1, 4))


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes that an engine of this role compiles, each (tokens, sequences), ascending. blocks:
    of pages, that one call copies, ascending from 1.
    """

    role: Role
    sizes: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...] = (1,)

    @classmethod
    def for_role(cls, role: Role, limits: Limits, kernels: str = "cpu") -> "Shapes":
        """kernels: by name (models.ops.KERNELS)."""
        prompts, decodes = role is not Role.DECODE, role is not Role.PREFILL
        most = limits.max_chunk * prompts + limits.max_batch * decodes
        of = _ON_ACCELERATOR if KERNELS[kernels].on_accelerator else _ON_CPU
        least = min(of.least if decodes else of.least_chunk, most)
        sizes = [size for size in bucket_sizes(most, of.coarse) if size >= least]
        if decodes:
            filled = next(size for size in sizes if size >= limits.max_batch)
            sizes = [size for size in sizes if size <= filled or size >= min(of.free, most)]
        each = tuple((size, min(size, limits.max_batch)) for size in sizes)
        return cls(role, each, of.blocks)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.sizes)

    @property
    def largest(self) -> tuple[int, int]:
        """No step has more tokens or more sequences."""
        return self.sizes[-1]

    def fitting(self, num_tokens: int, num_sequences: int) -> tuple[int, int]:
        """The smallest that holds so many."""
        return next(
            (tokens, sequences)
            for tokens, sequences in self.sizes
            if tokens >= num_tokens and sequences >= num_sequences
        )


class Functions:
    """The functions that an engine runs, jitted, and what they take.

    config: of the model. kernels: by name (models.ops.KERNELS).

    Attributes:
        params: the weights as the kernels take them, as shapes.
        pool: the page pool, as shapes.
        block: one block of pages in wire form as it lies on the mesh, as a shape.
        lanes: all of them, as a shape: see `kairos_jax.engine.lanes`.

    Raises:
        ValueError: the kernels do not take the model's heads or the pages, or a dimension cannot be
            split over the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        rules: Rules,
        limits: Limits,
        shapes: Shapes,
        dtype: DTypeLike,
        kernels: str,
    ):
        self.shapes, self.limits, self.mesh = shapes, limits, mesh
        own = KERNELS[kernels]
        packed = pack_config(config, own, mesh, rules)
        on_this_mesh = on_mesh(own, packed, mesh, rules)
        layout = on_this_mesh.layout
        self.params = abstract_packed(config, dtype, own, mesh, rules)
        self.pool = kv_cache.abstract(
            packed,
            layout,
            limits.num_pages,
            limits.page_size,
            dtype,
            layout.shardings(packed, mesh, rules),
        )
        wire = rules.without_copies(mesh, config.num_kv_heads)
        wire_sharding = NamedSharding(mesh, wire.spec((None, None, "kv_heads", None, None)))
        tokens = BLOCK_PAGES * limits.page_size
        shape = (config.num_layers, tokens, config.num_kv_heads, 2, config.head_dim)
        self.block = jax.ShapeDtypeStruct(shape, dtype, sharding=wire_sharding)
        self._hidden_size, self._dtype = config.hidden_size, dtype
        replicated = NamedSharding(mesh, PartitionSpec())
        self.lanes = jax.ShapeDtypeStruct(lanes.shape(limits), np.int32, sharding=replicated)
        split = NamedSharding(mesh, rules.spec((None, "vocab")))

        def head(params, hidden, rows=None):
            # Each device makes the logits of its part of the vocabulary. They are whole after that,
            # for the filters look at them 32 times over. Without the first constraint the second
            # reaches through the product, and gathers the weight.
            parts = logits(packed, params, hidden, on_this_mesh, rows)
            parts = jax.lax.with_sharding_constraint(parts, split)
            return jax.lax.with_sharding_constraint(parts, replicated)

        def step(params, cache, known, tokens, sequences):
            known, inputs, how = lanes.unpack(known, tokens, sequences, limits)
            hidden, cache = hidden_states(packed, params, cache, inputs, on_this_mesh)
            with jax.named_scope("sample"):
                last = head(params, last_states(hidden, inputs), inputs.num_sequences)
                sampled = sampling.sample(last, how, all_finite(hidden, inputs))
                return cache, lanes.keep(known, sequences, sampled[:, 0]), hidden, sampled

        def score(params, hidden, targets):
            return sampling.score(functools.partial(head, params), hidden, targets)

        def read(cache, pages):
            # An array for each block, since they are given away one by one. Not in a loop: for
            # that, XLA for TPU brings the whole pool into fast memory.
            each = pages.reshape(-1, BLOCK_PAGES)
            return tuple(kv_cache.read_pages(config, layout, cache, some) for some in each)

        def write(cache, pages, blocks):
            return kv_cache.write_pages(layout, cache, pages, jnp.concatenate(blocks, axis=1))

        # Functions of these programs' own: JAX keeps one cache of programs for each function, which
        # `num_compiled` looks at. The pool is donated, so that a step writes the pages where they
        # are: 88 against 540 ms at batch 16. So are the lanes.
        of_pool = jax.tree.map(lambda leaf: leaf.sharding, self.pool)
        self._step = jax.jit(
            step, donate_argnums=(1, 2), out_shardings=(of_pool, replicated, replicated, replicated)
        )
        self._fill = jax.jit(lanes.fill, donate_argnums=0, out_shardings=replicated)
        # Compiled when it is first asked for: few ever ask, and without the layers it is soon done.
        self._score = jax.jit(score, out_shardings=replicated)
        # What leaves a mesh that spans processes must be whole on the devices of one of them.
        of_block = replicated if mesh.is_multi_process else wire_sharding
        self._read = jax.jit(read, out_shardings=of_block)
        self._write = jax.jit(write, donate_argnums=0, out_shardings=of_pool)

    @property
    def num_compiled(self) -> int:
        """Programs that JAX has compiled by calls of the functions."""
        functions: tuple[Any, ...] = (
            *(self._step, self._fill, self._score),
            *(self._read, self._write),
        )
        return sum(function._cache_size() for function in functions)

    def of(
        self, call: Call, params: Any, pool: Any, known: Any, hidden: Any
    ) -> tuple[str, Any, tuple[Any, ...]]:
        """Name, function and arguments of a call; the arrays may be shapes. known: the lanes.
        hidden: of the step before it, for Score.
        """
        match call:
            case Step(tokens, sequences):
                return "step", self._step, (params, pool, known, tokens, sequences)
            case Fill(numbers, rows):
                return "fill", self._fill, (known, numbers, rows)
            case Score(targets):
                return "score", self._score, (params, hidden, targets)
            case Read(pages):
                return "read", self._read, (pool, pages)
            case Write(pages, blocks):
                return "write", self._write, (pool, pages, blocks)

    def described(self) -> Iterator[tuple[Call, str, Any, tuple[Any, ...]]]:
        """All programs: what calls each, its name, function and arguments, the arrays as shapes."""
        made: list[Call] = [calls.padding(*size, self.limits) for size in self.shapes]
        tokens, _ = self.shapes.largest
        if self.shapes.role is not Role.DECODE:
            made.append(Score(np.zeros(tokens, np.int32)))  # for smaller steps it is the same
        made.append(lanes.no_fill(self.limits))
        for count in self.shapes.blocks:
            pages = np.zeros(count * BLOCK_PAGES, np.int32)
            made += [Read(pages), Write(pages, (self.block,) * count)]
        whole = NamedSharding(self.mesh, PartitionSpec())
        hidden = jax.ShapeDtypeStruct((tokens, self._hidden_size), self._dtype, sharding=whole)
        for call in made:
            yield call, *self.of(call, self.params, self.pool, self.lanes, hidden)
