"""Fits the coefficients of a profile to measured step times, by relative error, and says which fits
are too poor to use.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.cost import FORMS, KINDS

# A form that the kernels do not declare must have an error smaller by this factor: where contexts
# cost next to nothing, both forms fit and noise would decide.
_CLEARLY = 0.9

# Below this R2 a fit explains less than half of how step times differ, and users are warned.
POOR_R2 = 0.5

Decode = tuple[int, int, float]
"""(batch, context, seconds) of a step whose sequences all have `context` tokens."""

Mixed = tuple[int, int, int, float]
"""(batch, tokens of all contexts, tokens of the longest, seconds) of a decode step."""


def fit(
    prefill: Sequence[tuple[int, int, float]] | None = None,
    decode: Sequence[Decode] | None = None,
    transfer: Sequence[tuple[int, float]] | None = None,
    *,
    mixed: Sequence[Mixed] = (),
    form: str = "ragged",
    buckets: Sequence[int] = (),
    row_tokens: int = 1,
) -> dict[str, Any]:
    """Fits a profile's coefficients to measured samples. A kind without samples, None, is left out.

    Args:
        prefill: (num_tokens, computed, seconds) of steps of one chunk.
        decode, mixed: steps whose contexts are alike, and steps whose contexts differ. Only the
            latter tell one form from the other.
        transfer: (num_tokens, seconds).
        form: see DecodeCost; the one that the kernels declare. The other form is used where it fits
            `mixed` clearly better.
        buckets: see DecodeCost.
        row_tokens: see PrefillCost.

    Returns:
        "prefill", "decode" and "transfer" as a profile has them, and in "fit" for each of them r2
        (None where all samples are equal), p50_rel_error and p90_rel_error. For decode the same of
        each form, in "forms", and the form that was "declared".

    Raises:
        ValueError: an empty list of samples, or a time that is not positive.
    """
    fitted: dict[str, Any] = {}
    residuals: dict[str, Any] = {}
    if prefill is not None:
        fitted["prefill"], residuals["prefill"] = _fit_prefill(prefill, row_tokens)
    if decode is not None:
        points = [(batch, batch * context, context, s) for batch, context, s in decode]
        fitted["decode"], residuals["decode"] = _fit_decode(points, mixed, form, buckets)
    if transfer is not None:
        line = _Line.of("transfer", [(1, n) for n, _ in transfer], transfer)
        fitted["transfer"] = line.named("base_s", "per_token_s")
        residuals["transfer"] = line.residuals
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
        coefficients = {name: 0.0 for name in profile[kind] if name.endswith("_s")}
        usable[kind] = coefficients | {"base_s": statistics.fmean(seconds)}
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


@dataclass(frozen=True, slots=True)
class _Line:
    """Coefficients, and what they predict for the samples [S], in seconds."""

    coefficients: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray

    @classmethod
    def of(cls, kind: str, features: Sequence[tuple], samples: Sequence[tuple]) -> "_Line":
        """The best line through samples whose last number is their time."""
        seconds = [sample[-1] for sample in samples]
        if not seconds or min(seconds) <= 0:
            raise ValueError(f"{kind} needs samples with positive times, got {seconds[:3]}")
        x, measured = np.array(features, dtype=float), np.array(seconds, dtype=float)
        coefficients = _relative_nnls(x, measured)
        return cls(coefficients, x @ coefficients, measured)

    def named(self, *names: str) -> dict[str, Any]:
        """The coefficients as a profile has them."""
        return dict(zip(names, self.coefficients.tolist(), strict=True))

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


def _fit_prefill(
    samples: Sequence[tuple[int, int, float]], row_tokens: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = [(-(-n // row_tokens) * row_tokens, computed) for n, computed, _ in samples]
    features = [(1, n, n * (2 * computed + n)) for n, computed in rows]
    line = _Line.of("prefill", features, samples)
    named = line.named("base_s", "per_token_s", "per_token_sq_s")
    return named | {"row_tokens": row_tokens}, line.residuals


def _fit_decode(
    alike: Sequence[Mixed], mixed: Sequence[Mixed], form: str, buckets: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    fits = {each: _fit_form([*alike, *mixed], each, buckets) for each in FORMS}
    used = form
    if mixed:
        used = min(fits, key=lambda each: fits[each][1].error * (_CLEARLY if each == form else 1.0))
    decode, line = fits[used]
    forms = {each: line.residuals for each, (_, line) in fits.items()}
    return decode, line.residuals | {"declared": form, "forms": forms}


def _fit_form(
    samples: Sequence[Mixed], form: str, buckets: Sequence[int]
) -> tuple[dict[str, Any], _Line]:
    sizes = [min((b for b in buckets if b >= batch), default=batch) for batch, *_ in samples]
    tokens = [
        total if form == "ragged" else size * longest
        for size, (_, total, longest, _) in zip(sizes, samples, strict=True)
    ]
    features = [(1, size, count) for size, count in zip(sizes, tokens, strict=True)]
    line = _Line.of("decode", features, samples)
    decode = line.named("base_s", "per_seq_s", "per_context_token_s")
    decode |= {"form": form, "buckets": list(buckets)}
    if not buckets:
        return decode, line
    ratios = line.measured / line.predicted
    factors, of_samples = _factors(np.array(sizes), ratios, sorted(buckets))
    line = _Line(line.coefficients, line.predicted * of_samples, line.measured)
    return decode | {"factors": factors}, line


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
    three columns, so at most eight).
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
