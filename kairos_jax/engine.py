"""Compiled steps over shape buckets: the one place where a ledger's work becomes arrays.

An engine owns its weights and its page pool on one mesh. One thread drives it. Where the mesh spans
processes, each has an engine, and all of them run the same calls (kairos_jax.followers).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from kairos_jax.programs import Programs
from models import kv_cache, sampling
from models.config import ModelConfig
from models.kv_cache import StepInput
from models.llama import Params, forward, pack, pack_config
from models.ops import KERNELS, on_mesh
from models.sampling import SamplingInput, SamplingParams
from models.sharding import Rules
from schedulers.core import Limits, Role
from schedulers.request import Seq

KV = Sequence[jax.Array]
"""Pages in wire form: blocks of `BLOCK_PAGES` pages (models.kv_cache.read_pages), the last padded.

Blocks of one size, so that one compiled gather and one scatter serve prompts of every length.
"""

BLOCK_PAGES = 4


class Token(NamedTuple):
    """One sampled token. logprob and top (id, logprob) are None and () unless asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """What a worker needs of an engine. `JaxEngine` is the real one; tests have a fake."""

    limits: Limits

    @property
    def wire_sharding(self) -> Sharding | None:
        """Where KV in wire form must be placed before `write_pages`. None: whole blocks will do, on
        this host or on a device of this process.
        """
        ...

    def step(self, work: Sequence[tuple[Seq, int]]) -> dict[str, Token]:
        """Computes the next n tokens of each (sequence, n). Returns the token sampled for each
        sequence that has none left to compute, by request id.
        """
        ...

    def read_pages(self, pages: Sequence[int]) -> KV:
        """A copy of these pages in wire form."""
        ...

    def write_pages(self, pages: Sequence[int], kv: KV) -> None:
        """Writes what another engine's `read_pages` gave, now on `wire_sharding`, into `pages`."""
        ...


def bucket_sizes(limit: int) -> tuple[int, ...]:
    """1, 2, 4, 6, 8, 12, 16, 24, ... up to and including `limit`: padding wastes a third at most
    from 4 on, for two compilations a doubling.
    """
    sizes = {1, 2, limit}
    size = 4
    while size < limit:
        sizes |= {size, size + size // 2}
        size *= 2
    return tuple(sorted(size for size in sizes if size <= limit))


@dataclass(frozen=True, slots=True)
class Shapes:
    """The (rows, tokens a row) shapes that an engine compiles.

    Prefill cuts each chunk into rows of `row_tokens`, decode has a row a sequence.
    """

    row_tokens: int
    prefill_rows: tuple[int, ...]
    decode_rows: tuple[int, ...]

    @classmethod
    def for_role(cls, role: Role, limits: Limits, row_tokens: int) -> "Shapes":
        rows = -(-limits.max_chunk // row_tokens)
        # Small chunks are not padded further: a row of prompt costs as much as many decode steps.
        few = range(1, min(rows, 8) + 1)
        return cls(
            row_tokens,
            tuple(sorted({*few, *bucket_sizes(rows)})) if role is not Role.DECODE else (),
            bucket_sizes(limits.max_batch) if role is not Role.PREFILL else (),
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from ((rows, self.row_tokens) for rows in self.prefill_rows)
        yield from ((rows, 1) for rows in self.decode_rows)


class Step(NamedTuple):
    """A call of the compiled forward step."""

    inputs: StepInput
    how: SamplingInput


class Read(NamedTuple):
    """A call that copies one block of pages out. pages: int32 ids [BLOCK_PAGES]."""

    pages: np.ndarray


class Write(NamedTuple):
    """A call that writes one block into the pool. Ids past the pool are dropped."""

    pages: np.ndarray
    block: jax.Array


Call = Step | Read | Write
"""All that ever runs on a mesh, as arrays."""


@dataclass(frozen=True, slots=True)
class _Row:
    """Up to Q consecutive tokens of one sequence."""

    seq: Seq
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether it is its sequence's last: the next token is sampled from it."""
        return self.start + self.count == self.seq.length


class JaxEngine:
    """The engine of one instance: its weights, its page pool and its compiled steps.

    kernels: by name (models.ops.KERNELS). params: the weights as they were loaded; the engine
    keeps them as its kernels take them. packed: params are so already, those of another engine.
    programs: where the compiled ones are kept; None: nowhere. dispatch: runs each call; `run`,
    unless other processes are to run it too.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        rules: Rules,
        limits: Limits,
        shapes: Shapes,
        dtype: DTypeLike = jnp.float32,
        kernels: str = "cpu",
        packed: bool = False,
        programs: Programs | None = None,
    ):
        self.config, self.mesh, self.limits, self.shapes = config, mesh, limits, shapes
        self.kernels = kernels
        packed_config = pack_config(config, KERNELS[kernels])
        self.params = params if packed else pack(config, params, KERNELS[kernels])
        on_this_mesh = on_mesh(KERNELS[kernels], packed_config, mesh, rules)
        layout = on_this_mesh.layout
        layer_sharding = layout.shardings(packed_config, mesh, rules)
        cache_sharding = (layer_sharding,) * config.num_layers
        wire_sharding = NamedSharding(mesh, rules.spec((None, None, "kv_heads", None, None)))
        tokens = BLOCK_PAGES * limits.page_size
        shape = (config.num_layers, tokens, config.num_kv_heads, 2, config.head_dim)
        # One block in wire form, as it lies on this mesh.
        self.block = jax.ShapeDtypeStruct(shape, dtype, sharding=wire_sharding)
        self._cache = kv_cache.allocate(
            packed_config, layout, limits.num_pages, limits.page_size, dtype, layer_sharding
        )
        self._table_pages = limits.pages_for(limits.max_context)
        replicated = NamedSharding(mesh, PartitionSpec())
        forward_step = functools.partial(forward, packed_config, kernels=on_this_mesh)

        def step(params, cache, inputs: StepInput, how: SamplingInput):
            logits, cache = forward_step(params, cache, inputs)
            with jax.named_scope("sample"):
                # Whole on every device: the filters look at the vocabulary 32 times over.
                logits = jax.lax.with_sharding_constraint(logits, replicated)
                return cache, sampling.sample(logits, how)

        def read(cache, pages):
            return kv_cache.read_pages(config, layout, cache, pages)

        def write(cache, pages, kv):
            return kv_cache.write_pages(layout, cache, pages, kv)

        # Functions of this engine's own: JAX keeps one cache of programs for each function, which
        # `num_compiled` looks at. The pool is donated, so that a step writes the pages where they
        # are: 88 against 540 ms at batch 16.
        self._step = jax.jit(step, donate_argnums=1, out_shardings=(cache_sharding, replicated))
        # What leaves a mesh that spans processes must be whole on the devices of one of them.
        read_sharding = replicated if mesh.is_multi_process else wire_sharding
        self._read = jax.jit(read, out_shardings=read_sharding)
        self._write = jax.jit(write, donate_argnums=0, out_shardings=cache_sharding)
        self._programs = programs
        # Where programs are kept: by name and shape, each for arguments of just one kind.
        self._kept: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.dispatch: Callable[[Call], Any] = self.run

    @property
    def wire_sharding(self) -> Sharding | None:
        """How KV in wire form [L, T, K, 2, H] lies on this mesh; None if that spans processes."""
        return None if self.mesh.is_multi_process else self.block.sharding

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far; it stays where it is after `warm_up`."""
        programs: tuple[Any, ...] = (self._step, self._read, self._write)
        return len(self._kept) + sum(program._cache_size() for program in programs)

    def warm_up(self, progress: Callable[[str], None] = lambda what: None) -> None:
        """Compiles every shape, by a run of each over padding rows alone. Where programs are kept
        they need not run, which takes as long as loading them.
        """
        for rows, queries in self.shapes:
            progress(f"{rows} x {queries} tokens")
            call = self.padding(rows, queries)
            if self._programs is None:
                self.dispatch(call)
            else:
                self._program(call)
        progress("page moves")
        self.write_pages([], [self.dispatch(Read(_block_ids([], 0)))])
        self.wait()

    def wait(self) -> None:
        """Returns when all that was dispatched has run."""
        jax.block_until_ready(self._cache)

    def step(self, work: Sequence[tuple[Seq, int]]) -> dict[str, Token]:
        """See `Engine.step`. Rows beyond the largest compiled shape take further runs."""
        chunks, singles = [], []
        for seq, count in work:
            (singles if count == 1 and self.shapes.decode_rows else chunks).append((seq, count))
        queries = self.shapes.row_tokens
        prefill_rows = [
            _Row(seq, seq.computed + offset, min(queries, count - offset))
            for seq, count in chunks
            for offset in range(0, count, queries)
        ]
        decode_rows = [_Row(seq, seq.computed, 1) for seq, _ in singles]
        runs = []
        for rows, sizes, width in (
            (prefill_rows, self.shapes.prefill_rows, queries),
            (decode_rows, self.shapes.decode_rows, 1),
        ):
            for first in range(0, len(rows), sizes[-1] if sizes else 1):
                part = rows[first : first + sizes[-1]]
                size = next(size for size in sizes if size >= len(part))
                runs.append((part, self.run_rows(part, size, width)))
        tokens: dict[str, Token] = {}
        for rows, packed in runs:
            tokens |= _tokens(rows, np.asarray(packed))
        return tokens

    def run_rows(self, rows: Sequence[_Row], size: int, queries: int) -> jax.Array:
        """Dispatches one compiled step of `size` rows. Returns the packed samples (see
        models.sampling.unpack), still on the device.
        """
        call = self.padding(size, queries)
        inputs = call.inputs
        for index, row in enumerate(rows):
            ids = row.seq.token_ids(row.start, row.start + row.count)
            inputs.tokens[index, : row.count] = ids
            inputs.start[index], inputs.count[index] = row.start, row.count
            inputs.page_table[index, : len(row.seq.pages)] = row.seq.pages
        _fill(call.how, rows)
        return self.dispatch(call)

    def padding(self, size: int, queries: int) -> Step:
        """A step of `size` rows, all of them padding."""
        inputs = StepInput(
            tokens=np.zeros((size, queries), np.int32),
            start=np.zeros(size, np.int32),
            count=np.zeros(size, np.int32),
            page_table=np.zeros((size, self._table_pages), np.int32),
        )
        how = SamplingInput(
            temperature=np.zeros(size, np.float32),
            top_k=np.zeros(size, np.int32),
            top_p=np.ones(size, np.float32),
            min_p=np.zeros(size, np.float32),
            seed=np.zeros(size, np.uint32),
            position=np.zeros(size, np.int32),
            logprobs=np.zeros(size, np.bool_),
        )
        return Step(inputs, how)

    def run(self, call: Call) -> jax.Array | None:
        """Dispatches one call, and returns its samples or its block, still on the device."""
        program, args = self._program(call)
        result = program(*args)
        match call:
            case Step():
                self._cache, packed = result
                return packed
            case Read():
                return result
            case Write():
                self._cache = result

    def _program(self, call: Call) -> tuple[Any, tuple[Any, ...]]:
        """What runs this call, and its arguments: a jitted function, or, where programs are kept,
        what it is compiled to for these.
        """
        match call:
            case Step(inputs, how):
                name, function, shape = "step", self._step, inputs.tokens.shape
                args = self.params, self._cache, inputs, how
            case Read(pages):
                name, function, shape = "read", self._read, pages.shape
                args = self._cache, pages
            case Write(pages, block):
                name, function, shape = "write", self._write, pages.shape
                args = self._cache, pages, block
        if self._programs is None:
            return function, args
        if (name, shape) not in self._kept:
            self._kept[name, shape] = self._programs.compiled(name, function, *args)
        return self._kept[name, shape], args

    def read_pages(self, pages: Sequence[int]) -> KV:
        """See `Engine.read_pages`."""
        return [self.dispatch(Read(_block_ids(block, 0))) for block in _blocks(pages)]

    def write_pages(self, pages: Sequence[int], kv: KV) -> None:
        """See `Engine.write_pages`."""
        # Padding ids point past the pool, where the scatter drops them.
        past = self.limits.num_pages
        for block, arrays in zip(_blocks(pages) or [[]], kv, strict=True):
            self.dispatch(Write(_block_ids(block, past), arrays))


def _block_ids(pages: Sequence[int], padding: int) -> np.ndarray:
    ids = np.full(BLOCK_PAGES, padding, np.int32)
    ids[: len(pages)] = pages
    return ids


def _blocks(pages: Sequence[int]) -> list[Sequence[int]]:
    return [pages[first : first + BLOCK_PAGES] for first in range(0, len(pages), BLOCK_PAGES)]


def _fill(how: SamplingInput, rows: Sequence[_Row]) -> None:
    for index, row in enumerate(rows):
        if not row.samples:
            continue  # not the sequence's last row: nothing is sampled from it
        params: SamplingParams = row.seq.request.sampling or SamplingParams()
        how.temperature[index], how.seed[index] = params.temperature, params.seed
        how.top_k[index], how.top_p[index] = params.top_k, params.top_p
        how.min_p[index], how.position[index] = params.min_p, row.seq.length
        how.logprobs[index] = params.logprobs is not None


def _tokens(rows: Sequence[_Row], packed: np.ndarray) -> Mapping[str, Token]:
    sampled = sampling.unpack(packed)
    tokens = {}
    for index, row in enumerate(rows):
        if not row.samples:
            continue
        params: SamplingParams = row.seq.request.sampling or SamplingParams()
        id = int(sampled.token[index])
        if params.logprobs is None:
            tokens[row.seq.request.id] = Token(id)
            continue
        ids = sampled.top_tokens[index, : params.logprobs].tolist()
        values = sampled.top_logprobs[index, : params.logprobs].tolist()
        top = tuple(zip(ids, values, strict=True))
        tokens[row.seq.request.id] = Token(id, float(sampled.logprob[index]), top)
    return tokens
