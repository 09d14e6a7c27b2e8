"""Measures the jitted steps and fits the profile that policies, simulator and reports use."""

import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from kairos_jax import __version__
from kairos_jax.config import ServerConfig
from kairos_jax.engine.engine import BLOCK_PAGES, JaxEngine
from kairos_jax.engine.model import Model
from kairos_jax.engine.profile_file import read
from kairos_jax.process.cache import cache_dir
from kairos_jax.process.progress import Progress
from schedulers import cost
from schedulers.ledger.request import Request, Seq, Slo

# Passes over all points, so that a noisy moment spoils no point's median; and what each point gets
# in each of them: short enough to measure the whole grid in about a minute.
_PASSES = 3


_REPEATS = 5


_BUDGET_S = 0.2


# KV moves in whole blocks: tokens that fill them.
_TRANSFER_BLOCKS = (1, 2, 4)


def measure(
    engines: Sequence[JaxEngine], config: ServerConfig, name: str, progress: Progress
) -> dict:
    """Times each kind of step over its shapes, on one instance of each role with all others idle,
    and fits the profile. What engines of one role cannot show is left out.

    Returns:
        The profile (DESIGN: "Profile file"); "samples" are medians in seconds.
    """
    points = _points(engines)
    times: list[list[float]] = [[] for _ in points]
    total = _PASSES * len(points)
    for done, (_, index) in enumerate(itertools.product(range(_PASSES), range(len(points)))):
        progress("measure step times", done, total)
        times[index] += _times_s(points[index][-1])
    progress("measure step times", total, total)
    samples: dict[str, list[tuple]] = {kind: [] for kind in _kinds(engines)}
    for (kind, point, _), of_point in zip(points, times, strict=True):
        samples[kind].append((*point, statistics.median(of_point)))
    fitted = cost.fit(
        **samples,
        form="padded",
        buckets=engines[-1].shapes.decode_rows,
        row_tokens=engines[0].shapes.row_tokens,
    )
    device = engines[0].mesh.devices.flat[0]
    return {
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


def _kinds(engines: Sequence[JaxEngine]) -> list[str]:
    """What steps of these engines show the times of."""
    prefills, decodes = bool(engines[0].shapes.prefill_rows), bool(engines[-1].shapes.decode_rows)
    shown = (prefills, decodes, prefills and decodes)
    return [kind for kind, there in zip(cost.KINDS, shown, strict=True) if there]


def _points(
    engines: Sequence[JaxEngine],
) -> list[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """What is timed: its kind, its lengths, and a run of it."""
    first, last = engines[0], engines[-1]
    points = [
        *(("prefill", p, functools.partial(_prefill, first, *p)) for p in _prefill_points(first)),
        *(("decode", p, functools.partial(_decode, last, *p)) for p in _decode_points(last)),
        *(
            ("transfer", (n,), functools.partial(_transfer, first, last, n))
            for n in _transfer_points(first)
        ),
    ]
    kinds = _kinds(engines)
    return [point for point in points if point[0] in kinds]


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
    cached.parent.mkdir(parents=True, exist_ok=True)
    # One process of this user's at a time: else each would measure the others' noise. Those of one
    # role then find what the first has measured.
    with (cached.parent / "measuring.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cached.exists():
            return read(cached, kinds)
        profile = measure(engines, config, config.model, progress)
        write(profile, cached)
    return profile


def write(profile: dict, path: Path) -> None:
    """Writes a profile as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(profile, indent=1) + "\n")
    partial.replace(path)


def fit_line(profile: dict) -> str:
    """The fit's residuals in one line."""
    return ", ".join(
        f"{kind} R2 {fit['r2']:.3f}, p90 error {fit['p90_rel_error']:.0%}"
        for kind, fit in profile.get("fit", {}).items()
        if fit["r2"] is not None
    )


def _cached_path(config: ServerConfig, model: Model, engines: Sequence[JaxEngine]) -> Path:
    """Named by all that step times depend on."""
    first, last = engines[0], engines[-1]
    device = first.mesh.devices.flat[0]
    facts = (
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
    room = engine.limits.max_context - 1
    for rows in engine.shapes.prefill_rows:
        tokens = rows * engine.shapes.row_tokens
        for computed in (0, engine.limits.max_chunk, 2 * engine.limits.max_chunk):
            if computed == 0 or computed + tokens <= room:
                yield min(tokens, room), computed


def _decode_points(engine: JaxEngine) -> Iterable[tuple[int, int]]:
    """(sequences, context of each)."""
    longest = engine.limits.max_context - 1
    contexts = sorted({min(context, longest) for context in (64, 256, 1024)})
    return itertools.product(engine.shapes.decode_rows, contexts)


def _transfer_points(engine: JaxEngine) -> list[int]:
    block = BLOCK_PAGES * engine.limits.page_size
    return sorted({min(count * block, engine.limits.max_context) for count in _TRANSFER_BLOCKS})


def _seq(engine: JaxEngine, index: int, computed: int, tokens: int) -> Seq:
    """A sequence on the pool's first pages: what they hold does not change a step's time."""
    slo = Slo(1.0, 1.0)
    seq = Seq(Request(str(index), 0.0, [0] * (computed + tokens), 1, slo), computed=computed)
    pages = engine.limits.pages_for(computed + tokens)
    seq.pages = [(index * pages + page) % engine.limits.num_pages for page in range(pages)]
    return seq


def _prefill(engine: JaxEngine, tokens: int, computed: int) -> None:
    engine.step([(_seq(engine, 0, computed, tokens), tokens)])


def _decode(engine: JaxEngine, batch: int, context: int) -> None:
    engine.step([(_seq(engine, index, context, 1), 1) for index in range(batch)])


def _transfer(source: JaxEngine, target: JaxEngine, tokens: int) -> None:
    pages = list(range(source.limits.pages_for(tokens)))
    kv = source.read_pages(pages)
    target.write_pages(pages, [jax.device_put(block, target.wire_sharding) for block in kv])
    target.wait()


def _times_s(run: Callable[[], Any]) -> list[float]:
    """A few times, one at least."""
    times: list[float] = []
    while not times or (len(times) < _REPEATS and sum(times) < _BUDGET_S):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times
