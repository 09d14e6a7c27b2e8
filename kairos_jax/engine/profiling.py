"""Measures the jitted steps and fits the profile that policies, simulator and reports use."""

import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from kairos_jax import __version__
from kairos_jax.config import ServerConfig
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import BLOCK_PAGES
from kairos_jax.engine.model import Model
from kairos_jax.engine.profile_file import read
from kairos_jax.process.cache import NotPrivate, cache_dir, private_cache_dir, say_unusable
from kairos_jax.process.progress import Progress
from models.ops import KERNELS
from schedulers.cost import KINDS
from schedulers.fitting import fit, usable
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Seq, Slo

log = logging.getLogger(__name__)

# Raised whenever other points are measured, or the fit changes: a profile that was kept before is
# then measured again.
_VERSION = 4
# Passes over all points, so that a noisy moment spoils no point's median; and what each point gets
# in each of them: short enough to measure the whole grid in about a minute. Mixed steps are long,
# and one run a pass shows their form: they take a tenth of the measurement at most.
_PASSES, _REPEATS, _BUDGET_S = 3, 5, 0.2
_REPEATS_MIXED = 1
# KV moves in whole blocks: tokens that fill them.
_TRANSFER_BLOCKS = (1, 2, 4)
# Tokens of the shortest chunk of a prompt that is measured.
_LEAST_CHUNK = 32
# Contexts of decode steps whose sequences are alike; mixed steps have the first and the last.
_CONTEXTS = (64, 256, 1024)


def measure(
    engines: Sequence[JaxEngine], config: ServerConfig, name: str, progress: Progress
) -> dict:
    """Times each kind of step over its shapes, on one instance of each role with all others idle,
    and fits the profile. What engines of one role cannot show is left out.

    Returns:
        The profile (DESIGN: "Profile file"); "samples" are medians in seconds. Parts that are
        worse than none are left out: see `schedulers.fitting.usable`.
    """
    points = _points(engines)
    times: list[list[float]] = [[] for _ in points]
    total = _PASSES * len(points)
    for done, (_, index) in enumerate(itertools.product(range(_PASSES), range(len(points)))):
        progress("measure step times", done, total)
        kind, _, run = points[index]
        times[index] += _times_s(run, _REPEATS_MIXED if kind in ("mixed", "beside") else _REPEATS)
    progress("measure step times", total, total)
    samples: dict[str, list[tuple]] = {}
    for (kind, point, _), of_point in zip(points, times, strict=True):
        samples.setdefault(kind, []).append((*point, statistics.median(of_point)))
    fitted = _fitted(engines, samples)
    device = engines[0].mesh.devices.flat[0]
    profile = {
        "name": f"{name}, {config.layout}",
        "model": name,
        "platform": device.platform,
        "device": f"{device.device_kind} ({os.cpu_count()} cores)"
        if device.platform == "cpu"
        else device.device_kind,
        "dtype": config.dtype,
        "source": "measured",
        "date": datetime.date.today().isoformat(),
        "versions": {"kairos_jax": __version__, "jax": jax.__version__},
        **fitted,
        "kv_capacity_tokens": config.decode.kv_tokens,
        "samples": samples,
    }
    return usable(profile)


def _fitted(engines: Sequence[JaxEngine], samples: dict[str, list[tuple]]) -> dict[str, Any]:
    last = engines[-1]
    declared = KERNELS[last.kernels].contexts_of(
        last.block.dtype, last.config.head_dim, last.limits.page_size
    )
    fitted = fit(
        **samples,
        form=declared,
        buckets=_batches(last),
    )
    used = _row(fitted, "decode").get("form", declared)
    if used != declared:
        log.warning(
            "the kernels %s declare %s contexts, but measured decode steps fit %s ones better",
            *(last.kernels, declared, used),
        )
    return fitted


def _row(profile: dict[str, Any], kind: str) -> dict[str, Any]:
    """The coefficients of steps of that kind."""
    return profile.get(kind, profile.get("step", {}))


def _kinds(engines: Sequence[JaxEngine]) -> list[str]:
    """What steps of these engines show the times of."""
    roles = [engine.shapes.role for engine in engines]
    prefills, decodes = roles[0] is not Role.DECODE, roles[-1] is not Role.PREFILL
    shown = (prefills, decodes, prefills and decodes)
    return [kind for kind, there in zip(KINDS, shown, strict=True) if there]


def _points(
    engines: Sequence[JaxEngine],
) -> list[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """What is timed: its kind, its lengths, and a run of it."""
    first, last = engines[0], engines[-1]
    of_kind = {
        "prefill": [("prefill", p, _prefill(first, *p)) for p in _prefill_points(first)],
        "decode": [
            *(("decode", p, _decode(last, [p[1]] * p[0])) for p in _decode_points(last)),
            *(("mixed", (len(c), sum(c), max(c)), _decode(last, c)) for c in _mixtures(last)),
            *(("beside", p, _beside(last, *p)) for p in _beside_points(last)),
        ],
        "transfer": [
            ("transfer", (n,), functools.partial(_transfer, first, last, n))
            for n in _transfer_points(first)
        ],
    }
    return [point for kind in _kinds(engines) for point in of_kind[kind]]


def load_or_measure(
    path: Path | None,
    config: ServerConfig,
    model: Model,
    engines: Sequence[JaxEngine],
    progress: Progress,
) -> dict:
    """The profile at `path`; without one, that of the user's cache, measured now if need be."""
    kinds = _kinds(engines)
    if path is not None:
        return read(path, kinds)
    cached = _cached_path(config, model, engines)
    try:
        private_cache_dir(cached.parent.name)
    except NotPrivate as error:
        say_unusable(error)
        if cached.exists():
            return read(cached, kinds)
        return measure(engines, config, config.model, progress)
    # One process of this user's at a time: else each would measure the others' noise. Those of one
    # role then find what the first has measured.
    with (cached.parent / "measuring.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cached.exists():
            return read(cached, kinds)
        profile = measure(engines, config, config.model, progress)
        try:
            write(profile, cached)
        except OSError as error:
            log.warning("the step times are not kept: %s", error)
    return profile


def write(profile: dict, path: Path) -> None:
    """Writes a profile as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(profile, indent=1) + "\n")
    partial.replace(path)


def fit_line(profile: dict) -> str:
    """The fit's residuals in one line, and how decode steps read contexts."""
    form = _row(profile, "decode").get("form", "ragged")
    said = {"decode": f" (contexts {form})"}
    return ", ".join(
        f"{kind} R2 {fit['r2']:.3f}, p90 error {fit['p90_rel_error']:.0%}{said.get(kind, '')}"
        f"{' (left out: the mean is used)' if fit.get('left_out') else ''}"
        for kind, fit in profile.get("fit", {}).items()
        if fit["r2"] is not None
    )


def _cached_path(config: ServerConfig, model: Model, engines: Sequence[JaxEngine]) -> Path:
    """Named by all that step times depend on, and by how they are measured."""
    first, last = engines[0], engines[-1]
    device = first.mesh.devices.flat[0]
    facts = (
        _VERSION,
        model.checkpoint.config,
        config.dtype,
        config.rules,
        engines[0].kernels,
        config.page_size,
        config.max_context,
        *((e.mesh.size, e.shapes, e.limits.num_pages) for e in (first, last)),
        (device.device_kind, os.cpu_count(), jax.__version__, __version__),
    )
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return cache_dir("profiles") / f"{Path(config.model).stem}-{digest}.json"


def _prefill_points(engine: JaxEngine) -> Iterable[tuple[int, int]]:
    """(tokens, tokens computed before) of one chunk."""
    room, most = engine.limits.max_context - 1, engine.limits.max_chunk
    sizes = {size for size, _ in engine.shapes if _LEAST_CHUNK <= size < most}
    for tokens in sorted(sizes | {most}):
        for computed in (0, most, 2 * most):
            if computed == 0 or computed + tokens <= room:
                yield min(tokens, room), computed


def _decode_points(engine: JaxEngine) -> Iterable[tuple[int, int]]:
    """(sequences, context of each)."""
    longest = engine.limits.max_context - 1
    contexts = sorted({min(context, longest) for context in _CONTEXTS})
    return itertools.product(_batches(engine), contexts)


def _batches(engine: JaxEngine) -> list[int]:
    """Sequences of the decode steps that are measured: one, and those of every compiled size."""
    most = engine.limits.max_batch
    return sorted({1, most} | {size for size, _ in engine.shapes if size < most})


def _mixtures(engine: JaxEngine) -> Iterable[list[int]]:
    """Contexts of steps of three sizes: one long sequence among short ones, and every other one
    long.
    """
    sizes = [size for size in _batches(engine) if size > 1]
    longest = min(_CONTEXTS[-1], engine.limits.max_context - 1)
    shortest = max(min(_CONTEXTS[0], longest // 8), 1)
    for size in sorted({sizes[-1 - len(sizes) * third // 3] for third in range(3) if sizes}):
        one = [shortest] * size
        one[size // 2] = longest
        yield one
        if size > 2:
            yield [longest if index % 2 else shortest for index in range(size)]


def _beside_points(engine: JaxEngine) -> Iterable[tuple[int, int, int]]:
    """(sequences that decode, context of each, tokens of a chunk beside them)."""
    if engine.shapes.role is not Role.BOTH:
        return []
    limits = engine.limits
    if limits.max_batch < 2:
        return []
    context = min(_CONTEXTS[1], limits.max_context - 1)
    batches = sorted({limits.max_batch // 8 or 1, limits.max_batch // 2, limits.max_batch - 1})
    chunks = sorted({max(limits.max_chunk // part, 1) for part in (4, 1)})
    return ((batch, context, min(n, limits.max_context - 1)) for batch in batches for n in chunks)


def _transfer_points(engine: JaxEngine) -> list[int]:
    block = BLOCK_PAGES * engine.limits.page_size
    return sorted({min(count * block, engine.limits.max_context) for count in _TRANSFER_BLOCKS})


def _work(engine: JaxEngine, steps: Sequence[tuple[int, int]]) -> list[tuple[Seq, int]]:
    """Sequences to compute, each (tokens before, tokens of the step), on pages of their own while
    the pool has some. What pages hold does not change a step's time.
    """
    slo, limits, work, first = Slo(1.0, 1.0), engine.limits, [], 0
    for index, (computed, tokens) in enumerate(steps):
        request = Request(str(index), 0.0, [0] * (computed + tokens), 1, slo)
        seq, pages = Seq(request, computed=computed), limits.pages_for(computed + tokens)
        seq.pages = [(first + page) % limits.num_pages for page in range(pages)]
        first += pages
        work.append((seq, tokens))
    return work


def _prefill(engine: JaxEngine, tokens: int, computed: int) -> Callable[[], Any]:
    return _step(engine, [(computed, tokens)])


def _decode(engine: JaxEngine, contexts: Sequence[int]) -> Callable[[], Any]:
    return _step(engine, [(context, 1) for context in contexts])


def _beside(engine: JaxEngine, batch: int, context: int, tokens: int) -> Callable[[], Any]:
    return _step(engine, [*[(context, 1)] * batch, (0, tokens)])


def _step(engine: JaxEngine, steps: Sequence[tuple[int, int]]) -> Callable[[], Any]:
    """A step of the same sequences each time, as of a server: so they have their lanes."""
    return functools.partial(engine.step, _work(engine, steps))


def _transfer(source: JaxEngine, target: JaxEngine, tokens: int) -> None:
    pages = list(range(source.limits.pages_for(tokens)))
    kv = source.read_pages(pages)
    target.write_pages(pages, [jax.device_put(block, target.wire_sharding) for block in kv])
    target.wait()


def _times_s(run: Callable[[], Any], repeats: int) -> list[float]:
    """A few times, one at least."""
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < _BUDGET_S):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times
