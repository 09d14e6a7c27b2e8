"""Fits the coefficients of a profile to measured step times, by relative error, and says which fits
are too poor to use.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from schedulers.cost import FORMS, KINDS

# A form that the kernels do not declare must have an error smaller by this factor: where contexts
# cost next to nothing, both forms fit and noise would decide.
_CLEARLY = 0.9

# Below this R2 a fit explains less than half of how step times differ, and users are warned.
POOR_R2 = 0.5

Prefill = tuple[int, int, float]
"""(tokens, tokens computed before, seconds) of a step of one chunk of a prompt."""

Decode = tuple[int, int, float]
"""(batch, context, seconds) of a step whose sequences all have `context` tokens."""

Mixed = tuple[int, int, int, float]
"""(batch, tokens of all contexts, tokens of the longest, seconds) of a decode step."""

Beside = tuple[int, int, int, float]
"""(batch, context, tokens, seconds) of a decode step that also begins a prompt: these tokens."""


def fit(
    prefill: Sequence[Prefill] | None = None,
    decode: Sequence[Decode] | None = None,
    transfer: Sequence[tuple[int, float]] | None = None,
    *,
    mixed: Sequence[Mixed] = (),
    beside: Sequence[Beside] | None = None,
    form: str = "ragged",
    buckets: Sequence[int] = (),
) -> dict[str, Any]:
    """Fits a profile's coefficients to measured samples. A kind without samples, None, is left out.

    Args:
        decode, mixed: steps whose contexts are alike, and steps whose contexts differ. Only the
            latter tell one form from the other.
        beside: steps that do both. They are of an engine that does both jobs, as are all other
            samples then: one row of coefficients is fitted to all of them.
        transfer: (num_tokens, seconds).
        form: see StepCost; the one that the kernels declare. The other form is used where it fits
            `mixed` clearly better.
        buckets: see StepCost.

    Returns:
        "step", or "prefill" and "decode", and "transfer" as a profile has them, and in "fit" for
        each kind of samples r2 (None where all samples are equal), p50_rel_error and p90_rel_error.
        For decode the same of each form, in "forms", and the form that was "declared".

    Raises:
        ValueError: an empty list of samples, or a time that is not positive.
    """
    fitted: dict[str, Any] = {}
    residuals: dict[str, Any] = {}
    if beside is not None:
        points = [*map(_of_prefill, prefill or ()), *map(_of_beside, beside)]
        fitted["step"], of_decode, rest = _fit_steps(points, decode or (), mixed, form, buckets)
        residuals["prefill"] = rest[: len(prefill or ())].residuals
        residuals["decode"] = of_decode
        residuals["beside"] = rest[len(prefill or ()) :].residuals
    else:
        if prefill is not None:
            line = _Line.of("prefill", [*map(_of_prefill, prefill)], _SHOWN["prefill"])
            fitted["prefill"], residuals["prefill"] = line.named(), line.residuals
        if decode is not None:
            fitted["decode"], residuals["decode"], _ = _fit_steps([], decode, mixed, form, buckets)
    if transfer is not None:
        points = [((1, n), seconds) for n, seconds in transfer]
        line = _Line.of("transfer", points, ("base_s", "per_token_s"))
        fitted["transfer"], residuals["transfer"] = line.named(), line.residuals
    return fitted | {"fit": residuals}


def usable(profile: Mapping[str, Any]) -> dict[str, Any]:
    """The profile without the parts that are worse than none.

    A part whose R2 is below 0 predicts its own samples worse than their mean does. The mean takes
    its place: the same time for every step, whatever its size. "fit" then says left_out for the
    part. A profile that has no samples of the part stays as it is.
    """
    usable = dict(profile)
    for kind in KINDS:
        seconds = _seconds(profile, kind)
        if not seconds or not (_r2(profile, kind) or 0.0) < 0:
            continue
        names = _SHOWN.get(kind, ("base_s", "per_token_s"))
        usable[kind] = dict.fromkeys(names, 0.0) | {"base_s": statistics.fmean(seconds)}
        usable["fit"] = {**usable["fit"], kind: {**usable["fit"][kind], "left_out": True}}
    return usable


def warnings(profile: Mapping[str, Any]) -> list[str]:
    """A sentence for each part of a profile whose fit is poor, by name."""
    found = []
    for kind in KINDS:
        r2 = _r2(profile, kind)
        if r2 is None or r2 >= POOR_R2:
            continue
        text = f"The step-time profile fits {kind} poorly: R2 is {r2:.2f}"
        if r2 >= 0:
            found.append(f"{text}, below {POOR_R2:g}. Decisions that depend on it may be wrong.")
        elif seconds := _seconds(profile, kind):
            mean = f"{1000 * statistics.fmean(seconds):.3g} ms"
            found.append(
                f"{text}. Below 0 it predicts worse than the mean of its samples, so it is left "
                f"out of decisions: they take the mean, {mean}."
            )
        else:
            found.append(f"{text}, and there are no samples to take the mean of.")
    return found


def _r2(profile: Mapping[str, Any], kind: str) -> float | None:
    """None where it is not known. A profile may come from anywhere."""
    fits = profile.get("fit")
    of_kind = fits.get(kind) if isinstance(fits, Mapping) else None
    r2 = of_kind.get("r2") if isinstance(of_kind, Mapping) else None
    return float(r2) if isinstance(r2, int | float) else None


def _seconds(profile: Mapping[str, Any], kind: str) -> list[float]:
    """The measured times of a part; none if they are not all there."""
    samples = profile.get("samples")
    kinds = ("decode", "mixed") if kind == "decode" else (kind,)
    if not isinstance(samples, Mapping):
        return []
    rows = [row for each in kinds for row in (samples.get(each) or ())]
    times = [row[-1] for row in rows if isinstance(row, list | tuple) and row]
    if len(times) < len(rows) or not all(isinstance(time, int | float) for time in times):
        return []
    return [float(time) for time in times]


_Point = tuple[tuple[float, ...], float]
"""What a step's work is multiplied by, each coefficient in the order of `_COEFFICIENTS`, and its
seconds.
"""

_COEFFICIENTS = ("base_s", "per_token_s", "per_pair_s", "per_seq_s", "per_context_token_s")
# What engines of one job can show.
_SHOWN = {
    "prefill": ("base_s", "per_token_s", "per_pair_s"),
    "decode": ("base_s", "per_seq_s", "per_context_token_s"),
}


def _of_prefill(sample: Prefill) -> _Point:
    n, computed, seconds = sample
    return (1, n, n * (computed + 0.5 * n), 1, computed + n), seconds


def _of_decode(sample: Mixed, form: str, buckets: Sequence[int]) -> _Point:
    batch, total, longest, seconds = sample
    size = _size(batch, buckets)
    tokens = total if form == "ragged" else size * longest
    return (1, size, tokens, size, tokens), seconds


def _of_beside(sample: Beside) -> _Point:
    batch, context, n, seconds = sample
    tokens = batch * context
    return (1, batch + n, tokens + 0.5 * n * n, batch + 1, tokens + n), seconds


def _size(batch: int, buckets: Sequence[int]) -> int:
    return min((bucket for bucket in buckets if bucket >= batch), default=batch)


@dataclass(frozen=True, slots=True)
class _Line:
    """Coefficients by name, and what they predict for the samples [S], in seconds."""

    names: tuple[str, ...]
    coefficients: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray

    @classmethod
    def of(cls, kind: str, points: Sequence[_Point], names: tuple[str, ...]) -> "_Line":
        """The best line through the points, of these coefficients alone."""
        seconds = [point[-1] for point in points]
        if not seconds or min(seconds) <= 0:
            raise ValueError(f"{kind} needs samples with positive times, got {seconds[:3]}")
        x, measured = np.array([each for each, _ in points], float), np.array(seconds, float)
        if len(names) < x.shape[1]:
            x = x[:, [_COEFFICIENTS.index(name) for name in names]]
        coefficients = _relative_nnls(x, measured)
        return cls(names, coefficients, x @ coefficients, measured)

    def named(self) -> dict[str, Any]:
        """The coefficients as a profile has them."""
        return dict(zip(self.names, self.coefficients.tolist(), strict=True))

    def __getitem__(self, which: slice) -> "_Line":
        """The line, and some of its samples."""
        return replace(self, predicted=self.predicted[which], measured=self.measured[which])

    @property
    def error(self) -> float:
        """The root of the mean squared relative error."""
        return float(np.sqrt(np.mean((self.predicted / self.measured - 1) ** 2)))

    @property
    def residuals(self) -> dict[str, float | None]:
        predicted, measured = self.predicted, self.measured
        spread = float(np.sum((measured - measured.mean()) ** 2))
        relative = np.abs(predicted - measured) / measured
        return {
            "r2": 1 - float(np.sum((predicted - measured) ** 2)) / spread if spread else None,
            "p50_rel_error": float(np.quantile(relative, 0.5)),
            "p90_rel_error": float(np.quantile(relative, 0.9)),
        }


def _fit_steps(
    others: Sequence[_Point],
    alike: Sequence[Decode],
    mixed: Sequence[Mixed],
    form: str,
    buckets: Sequence[int],
) -> tuple[dict[str, Any], dict[str, Any], _Line]:
    """Decode steps, and others of the same engine, if there are any: a row of a profile, the
    residuals of the decode steps, and the line of the others.
    """
    decodes = [(batch, batch * context, context, s) for batch, context, s in alike] + [*mixed]
    fits = {each: _fit_form(others, decodes, each, buckets) for each in FORMS}
    used = form
    if mixed:
        used = min(fits, key=lambda each: fits[each][1].error * (_CLEARLY if each == form else 1.0))
    row, line, rest = fits[used]
    forms = {each: line.residuals for each, (_, line, _) in fits.items()}
    return row, line.residuals | {"declared": form, "forms": forms}, rest


def _fit_form(
    others: Sequence[_Point], decodes: Sequence[Mixed], form: str, buckets: Sequence[int]
) -> tuple[dict[str, Any], _Line, _Line]:
    points = [_of_decode(sample, form, buckets) for sample in decodes]
    names = _COEFFICIENTS if others else _SHOWN["decode"]
    both = _Line.of("decode", [*points, *others], names)
    line, rest = both[: len(points)], both[len(points) :]
    row = both.named() | {"form": form, "buckets": list(buckets)}
    if not buckets:
        return row, line, rest
    sizes = np.array([_size(batch, buckets) for batch, *_ in decodes])
    factors, of_samples = _factors(sizes, line.measured / line.predicted, sorted(buckets))
    line = replace(line, predicted=line.predicted * of_samples)
    return row | {"factors": factors}, line, rest


def _factors(
    sizes: np.ndarray, ratios: np.ndarray, buckets: Sequence[int]
) -> tuple[list[float], np.ndarray]:
    """A factor for each bucket: the geometric mean of its samples' ratios of measured to predicted
    times, or between those of its neighbours where it has none. And the factor of each sample [S].
    """
    known = np.unique(sizes)
    logs = np.array([np.log(ratios[sizes == size]).mean() for size in known])
    factors = np.exp(np.interp(buckets, known, logs))
    return factors.tolist(), np.exp(np.interp(sizes, known, logs))


def _relative_nnls(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares of (x @ c - y) / y with every c >= 0: exact, by trying each active set (at most
    five columns, so at most 32).
    """
    scale = np.maximum(np.abs(x).max(axis=0), 1e-300)
    weighted, ones = x / scale / y[:, None], np.ones_like(y)
    best, best_error = np.zeros(x.shape[1]), math.inf
    columns = range(x.shape[1])
    for size in range(len(columns) + 1):
        for active in map(list, itertools.combinations(columns, size)):
            candidate = np.zeros(x.shape[1])
            if active:
                candidate[active] = np.linalg.lstsq(weighted[:, active], ones, rcond=None)[0]
            error = float(np.sum((weighted @ candidate - ones) ** 2))
            if candidate.min() >= 0 and error < best_error:
                best, best_error = candidate, error
    return best / scale
