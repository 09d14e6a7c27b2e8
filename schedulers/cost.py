"""Predicts how long a prefill step, a decode step and a KV transfer take, from a profile.

The policies ask it for urgency and slack; in the simulator it is the engine. `schedulers.fitting`
makes the coefficients from measured samples. All times are seconds, all lengths tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from schedulers.ledger.rows import Rows

KINDS = ("prefill", "decode", "transfer")
"""What a profile has times of."""

FORMS = ("ragged", "padded")
"""How a decode step reads the contexts of its sequences: see `DecodeCost`."""

Number = Any
"""A number, or an array of numbers of one shape: these formulas hold elementwise."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """base_s a step; per_token_s and per_token_sq_s for its tokens. row_tokens: the engine pads
    each chunk to a multiple of it.
    """

    base_s: float
    per_token_s: float
    per_token_sq_s: float
    row_tokens: int = 1


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """base_s a step; per_seq_s and per_context_token_s for its sequences.

    form: "ragged" reads each context at its own length, "padded" reads every context at the length
    of the longest. buckets: a step computes a number of sequences that is rounded up to one of
    these, if there are any. factors: how much longer a step of each bucket takes than these
    coefficients say; empty: no longer.
    """

    base_s: float
    per_seq_s: float
    per_context_token_s: float
    form: str = "ragged"
    buckets: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TransferCost:
    """base_s a request; per_token_s for each token whose KV moves."""

    base_s: float
    per_token_s: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Step and transfer times of one model on one device. kv_capacity_tokens: KV that one decode
    instance holds.
    """

    prefill: PrefillCost
    decode: DecodeCost
    transfer: TransferCost
    kv_capacity_tokens: int

    @classmethod
    def from_profile(cls, profile: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> "CostModel":
        """Reads a profile (DESIGN: "Profile file").

        kinds: the tables that must be there. Policies of one role need only the table of that role.
        The times of a missing table are nan, so that no caller takes them for an answer.

        Raises ValueError that names a coefficient which is missing, negative or not finite.
        """
        profile = {kind: _UNKNOWN for kind in KINDS if kind not in kinds} | dict(profile)
        prefill, decode, transfer = (_table(profile, kind) for kind in KINDS)
        form = decode.get("form", "ragged")
        if form not in FORMS:
            raise ValueError(f'profile decode.form must be "ragged" or "padded", got {form!r}')
        buckets, factors = _buckets(decode.get("buckets", ()), decode.get("factors", ()))
        if form == "ragged" and not factors:
            buckets = ()  # files from before ragged steps had factors: buckets did not count there
        return cls(
            PrefillCost(
                *_coefficients(prefill, "prefill", "base_s", "per_token_s", "per_token_sq_s"),
                row_tokens=_count(prefill.get("row_tokens", 1), "prefill.row_tokens"),
            ),
            DecodeCost(
                *_coefficients(decode, "decode", "base_s", "per_seq_s", "per_context_token_s"),
                form=form,
                buckets=buckets,
                factors=factors,
            ),
            TransferCost(*_coefficients(transfer, "transfer", "base_s", "per_token_s")),
            _count(profile.get("kv_capacity_tokens"), "kv_capacity_tokens"),
        )

    def prefill_s(self, num_tokens: Number, computed: Number = 0) -> Number:
        """A step of one chunk of `num_tokens`, after `computed` tokens of the same prompt."""
        return self.prefill.base_s + self.chunk_s(num_tokens, computed)

    def chunk_s(self, num_tokens: Number, computed: Number = 0) -> Number:
        """What one more chunk adds to a prefill step that runs anyway."""
        cost = self.prefill
        n = num_tokens
        if cost.row_tokens > 1:
            n = -(-num_tokens // cost.row_tokens) * cost.row_tokens
        return n * (cost.per_token_s + cost.per_token_sq_s * (2 * computed + n))

    def prefill_step_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        """A step of several chunks, each (num_tokens, computed). No chunks take no time."""
        parts = [self.chunk_s(num_tokens, computed) for num_tokens, computed in chunks]
        return self.prefill.base_s + sum(parts) if parts else 0.0

    def prompt_s(self, num_tokens: Number, computed: Number, max_chunk: int) -> Number:
        """All `num_tokens` that remain of a prompt, in chunks of `max_chunk`.

        Closed form: only the last chunk is taken to be padded, so it is exact where max_chunk is a
        multiple of row_tokens.
        """
        num_steps = -(-num_tokens // max_chunk)
        return num_steps * self.prefill.base_s + self.chunk_s(num_tokens, computed)

    def decode_s(self, contexts: Sequence[int]) -> float:
        """A step of one token for each sequence, given their context lengths."""
        if not contexts:
            return 0.0
        return self.decode_step_s(len(contexts), sum(contexts), max(contexts))

    def decode_of(self, length: np.ndarray) -> float:
        """`decode_s` of an array of at least one context length [S]."""
        longest = 0.0 if self.decode.form == "ragged" else length.max()
        return float(self.decode_step_s(length.size, np.add.reduce(length), longest))

    def decode_all(self, *places: Rows) -> float:
        """`decode_s` of all sequences of `places`, at least one."""
        count, length, longest = 0, 0.0, 0.0
        for rows in places:
            count += len(rows.seqs)
            length += rows.num_tokens
        if self.decode.form != "ragged":
            longest = max(rows.length.max(initial=0.0) for rows in places)
        return float(self.decode_step_s(count, length, longest))

    def decode_step_s(self, batch: Number, sum_context: Number, max_context: Number) -> Number:
        """`decode_s` from its aggregates, of one batch of at least one or an array of them."""
        cost = self.decode
        size, factor = self._bucket(batch)
        tokens = sum_context if cost.form == "ragged" else size * max_context
        return factor * (cost.base_s + cost.per_seq_s * size + cost.per_context_token_s * tokens)

    @property
    def decode_base_s(self) -> float:
        """Seconds of a step that its sequences do not add. No TPOT below it can be kept."""
        return float(self._bucket(1)[1]) * self.decode.base_s

    def _bucket(self, batch: Number) -> tuple[Number, Number]:
        """The number of sequences that a step computes for `batch` of them: a bucket, if one is as
        large; and the bucket's factor.
        """
        buckets, factors = self.decode.buckets, self.decode.factors
        if not buckets:
            return batch, 1.0
        index = np.minimum(np.searchsorted(buckets, batch), len(buckets) - 1)
        size = np.maximum(np.asarray(buckets)[index], batch)
        return size, np.asarray(factors)[index] if factors else 1.0

    def scaled(self, factor: float) -> "CostModel":
        """The model whose every time is `factor` times this one's."""
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"factor must be positive, got {factor}")

        def scale(table: Any, *names: str) -> Any:
            return replace(table, **{name: factor * getattr(table, name) for name in names})

        return replace(
            self,
            prefill=scale(self.prefill, "base_s", "per_token_s", "per_token_sq_s"),
            decode=scale(self.decode, "base_s", "per_seq_s", "per_context_token_s"),
            transfer=scale(self.transfer, "base_s", "per_token_s"),
        )

    def transfer_s(self, num_tokens: int) -> float:
        """Bringing the KV of one request over."""
        return self.transfer.base_s + self.transfer.per_token_s * num_tokens


def _table(profile: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = profile.get(name)
    if not isinstance(table, Mapping):
        raise ValueError(f"profile {name} must be a table of coefficients, got {table!r}")
    return table


_UNKNOWN: Mapping[str, Any] = {}


def _coefficients(table: Mapping[str, Any], prefix: str, *names: str) -> list[float]:
    if table is _UNKNOWN:
        return [math.nan] * len(names)
    values = []
    for name in names:
        value: Any = table.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise ValueError(f"profile {prefix}.{name} must be finite and at least 0, got {value}")
        values.append(float(value))
    return values


def _buckets(sizes: Any, factors: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """decode.buckets and decode.factors of a profile, by size."""
    for name, values in (("buckets", sizes), ("factors", factors)):
        if not isinstance(values, list | tuple):
            raise ValueError(f"profile decode.{name} must be a list, got {values!r}")
    if factors and len(factors) != len(sizes):
        raise ValueError(f"profile decode.factors must be as many as buckets, got {factors!r}")
    for value in factors:
        if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"profile decode.factors must be positive, got {value!r}")
    counts = [_count(size, "decode.buckets") for size in sizes]
    order = sorted(range(len(counts)), key=counts.__getitem__)
    return tuple(counts[i] for i in order), tuple(float(factors[i]) for i in order if factors)


def _count(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"profile {name} must be a whole number of at least 1, got {value!r}")
    return value
