"""Compiled steps over shape buckets: the one place where a ledger's work becomes arrays.

An engine owns its weights and its page pool on one mesh. One thread drives it. Where the mesh spans
processes, each has an engine, and all of them run the same calls (kairos_jax.engine.followers).
"""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from kairos_jax.engine import calls
from kairos_jax.engine.calls import Call, Decode, Part, Read, Score, Step, Token, Write
from kairos_jax.engine.functions import BLOCK_PAGES, Functions, Shapes
from kairos_jax.engine.lanes import Fill, Holders, no_fill
from kairos_jax.engine.programs import Programs
from kairos_jax.process.parallel import parallel
from models import kv_cache
from models.config import ModelConfig
from models.ops import KERNELS
from models.params import pack
from models.sharding import Rules
from models.transformer import Params
from schedulers.ledger.instance import Limits
from schedulers.ledger.request import Seq

KV = Sequence[jax.Array]
"""Pages in wire form: blocks of `BLOCK_PAGES` pages (models.kv_cache.read_pages), the last one
padded.
"""


_Run = tuple[Callable[[np.ndarray], dict[str, Token]], jax.Array]
"""A compiled step that was dispatched: its packed samples (models.sampling.unpack), still on the
device, and what reads them."""


class Engine(Protocol):
    """What a worker needs of an engine. `JaxEngine` is the real one; tests have a fake."""

    limits: Limits

    @property
    def copy_s(self) -> float:
        """Seconds in which a block is copied out or in, about; 0: it is not known."""
        ...

    @property
    def wire_sharding(self) -> Sharding | None:
        """Where KV in wire form must be placed before `write_pages`. None: whole blocks will do, on
        this host or on a device of this process.
        """
        ...

    def start(self, work: Sequence[tuple[Seq, int]]) -> Callable[[], dict[str, Token]]:
        """Begins to compute the next n tokens of each (sequence, n).

        Returns what waits for it, on any thread, and returns the token sampled for each sequence
        that has none left to compute, by request id. One whose numbers are not finite has a token
        of id `models.sampling.INVALID`, with or without tokens left to compute.

        The result of the step before need not be there: a token that it samples is computed next
        though `Seq.tokens` still lacks it. All that is asked of an engine runs in the order in
        which it was asked.
        """
        ...

    def read_pages(self, pages: Sequence[int]) -> KV:
        """A copy of these pages in wire form."""
        ...

    def write_pages(self, pages: Sequence[int], kv: KV) -> None:
        """Writes what another engine's `read_pages` gave, now on `wire_sharding`, into `pages`;
        what is for a page past the pool is dropped.
        """
        ...

    def wait(self) -> None:
        """Returns when all that was asked of it has run."""
        ...


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
        self._functions = Functions(config, mesh, rules, limits, shapes, dtype, kernels)
        self.params = params if packed else pack(config, params, KERNELS[kernels], mesh, rules)
        # One block in wire form, as it lies on this mesh.
        self.block = self._functions.block
        self._cache = kv_cache.allocate(self._functions.pool)
        (self._lanes,) = kv_cache.allocate((self._functions.lanes,))
        self._holders = Holders(limits)
        self._hidden: jax.Array | None = None  # of the last step, for `Score`
        self._decode: Decode | None = None  # the last step, if it was one
        self.copy_s = 0.0
        self._programs = programs
        # Compiled programs, by name and shapes: each is for arguments of just one kind.
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self.dispatch: Callable[[Call], Any] = self.run

    @property
    def wire_sharding(self) -> Sharding | None:
        """How KV in wire form [L, T, K, 2, H] lies on this mesh; None if that spans processes."""
        return None if self.mesh.is_multi_process else self.block.sharding

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far; it stays where it is after `warm_up`."""
        return len(self._compiled) + self._functions.num_compiled

    def warm_up(self, progress: Callable[[str], None] = lambda what: None) -> None:
        """Compiles every shape, several at once, since XLA compiles mostly on one thread. On a mesh
        that spans processes, by a run of each over padding alone: all must compile in one order.
        """

        def compiled(size: tuple[int, int]) -> None:
            progress("{} tokens of {} sequences at most".format(*size))
            compile_it = self.dispatch if self.mesh.is_multi_process else self._program
            compile_it(calls.padding(*size, self.limits))

        at_once = 1 if self.mesh.is_multi_process else os.cpu_count()
        # The largest take longest.
        parallel([functools.partial(compiled, size) for size in [*self.shapes][::-1]], at_once)
        progress("page moves")
        self.dispatch(no_fill(self.limits))
        for count in self.shapes.blocks:
            read = self.dispatch(Read(_block_ids([], count, 0)))
            self.dispatch(Write(_block_ids([], count, self.limits.num_pages), tuple(read)))
        self.wait()
        self.copy_s = self._measured_copy_s()

    def _measured_copy_s(self) -> float:
        """See `Engine.copy_s`: of the most that one call copies, out of some pages and back."""
        count = self.shapes.blocks[-1]
        pages = range(min(count * BLOCK_PAGES, self.limits.num_pages))
        begun = time.perf_counter()
        self.write_pages(pages, self.read_pages(pages))
        self.wait()
        return (time.perf_counter() - begun) / (2 * num_blocks(len(pages)))

    def wait(self) -> None:
        """See `Engine.wait`. A read leaves nothing to wait for, but what is dispatched last runs
        after it.
        """
        self.dispatch(no_fill(self.limits))
        jax.block_until_ready((self._cache, self._lanes))

    def step(self, work: Sequence[tuple[Seq, int]]) -> dict[str, Token]:
        """Starts a step, and waits for it."""
        return self.start(work)()

    def start(self, work: Sequence[tuple[Seq, int]]) -> Callable[[], dict[str, Token]]:
        """See `Engine.start`. What is beyond the largest compiled shape takes further runs."""
        self._holders.begin()
        last = self._decode
        if last and (decode := last.next(work, self._holders, self.limits)):
            self._decode = decode
            runs: list[_Run] = [(decode.tokens, self._dispatch(decode.call))]
        else:
            runs = self._anew(work)
        for _, packed in runs:
            packed.copy_to_host_async()

        def wait() -> dict[str, Token]:
            return calls.merged(*(tokens(np.asarray(packed)) for tokens, packed in runs))

        return wait

    def _anew(self, work: Sequence[tuple[Seq, int]]) -> list[_Run]:
        """Dispatches a step of which nothing is known from the last one."""
        most_tokens, most_sequences = self.shapes.largest
        runs: list[_Run] = []
        parts: list[Part] = []
        room, lane_of = most_tokens, self._holders.lane
        for seq, count in work:
            start, length = seq.computed_and_length
            end = start + count
            while start < end:
                if not room or len(parts) == most_sequences:
                    runs.append(self._run(parts))
                    parts, room = [], most_tokens
                some = min(end - start, room)
                now = start + some
                parts.append(Part(seq, start, some, now == length, lane_of(seq, now)))
                start, room = now, room - some
        runs.append(self._run(parts))
        if len(runs) > 1:
            self._decode = None
        return runs

    def _run(self, parts: list[Part]) -> _Run:
        """Dispatches one compiled step. Log-probabilities of prompts are kept with their sequences
        until their last part.
        """
        size = self.shapes.fitting(sum(part.num_tokens for part in parts), len(parts))
        call = calls.step(parts, *size, self.limits)
        packed, self._decode = self._dispatch(call), Decode.of(parts, call)
        prompts = [part for part in parts if part.num_tokens > 1 or not part.samples]
        if any(part.num_scored for part in prompts):
            scored, at = self.dispatch(Score(calls.targets(parts, size[0]))), 0
            for part in parts:
                if part.num_scored:
                    part.seq.scored.append((scored, at, part.num_scored))
                at += part.num_tokens
        return functools.partial(calls.tokens, parts), packed

    def _dispatch(self, call: Step) -> jax.Array:
        """Dispatches a step, behind what its lanes lack. Returns its packed samples."""
        for fill in self._holders.fills():
            self.dispatch(fill)
        return self.dispatch(call)

    def run(self, call: Call) -> Any:
        """Dispatches one call, and returns its samples or its blocks, still on the device."""
        program, args = self._program(call)
        result = program(*args)
        match call:
            case Step():
                self._cache, self._lanes, self._hidden, packed = result
                return packed
            case Fill():
                self._lanes = result
            case Score() | Read():
                return result
            case Write():
                self._cache = result

    def _program(self, call: Call) -> tuple[Any, tuple[Any, ...]]:
        """What runs this call, and its arguments: what its function is compiled to for these; on a
        mesh that spans processes the jitted function itself.
        """
        last = self._lanes, self._hidden
        name, function, args = self._functions.of(call, self.params, self._cache, *last)
        if self.mesh.is_multi_process:
            return function, args
        key = (name, *(each.shape for each in call if isinstance(each, np.ndarray)))
        if key not in self._compiled:
            if self._programs is None:
                self._compiled[key] = function.lower(*args).compile()
            else:
                self._compiled[key] = self._programs.compiled(name, function, *args)
        return self._compiled[key], args

    def read_pages(self, pages: Sequence[int]) -> KV:
        """See `Engine.read_pages`."""
        kv: list[jax.Array] = []
        for first, count in self._ranges(num_blocks(len(pages))):
            kv += self.dispatch(Read(_block_ids(pages, count, 0, first)))
        return kv

    def write_pages(self, pages: Sequence[int], kv: KV) -> None:
        """See `Engine.write_pages`."""
        if len(kv) != num_blocks(len(pages)):
            raise ValueError(f"{len(pages)} pages are not {len(kv)} blocks")
        # Padding ids point past the pool, where the scatter drops them.
        past = self.limits.num_pages
        for first, count in self._ranges(len(kv)):
            ids = _block_ids(pages, count, past, first)
            self.dispatch(Write(ids, tuple(kv[first : first + count])))

    def _ranges(self, total: int) -> Iterator[tuple[int, int]]:
        """So many blocks in as few calls as may be: the first one of each, and how many."""
        first = 0
        while first < total:
            count = max(size for size in self.shapes.blocks if size <= total - first)
            yield first, count
            first += count


def num_blocks(num_pages: int) -> int:
    """Blocks that so many pages take."""
    return -(-num_pages // BLOCK_PAGES)


def _block_ids(pages: Sequence[int], count: int, padding: int, first: int = 0) -> np.ndarray:
    """Of `count` blocks of these pages, from block `first` on."""
    ids = np.full(count * BLOCK_PAGES, padding, np.int32)
    some = pages[first * BLOCK_PAGES : (first + count) * BLOCK_PAGES]
    ids[: len(some)] = some
    return ids
