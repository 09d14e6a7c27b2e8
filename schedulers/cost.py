"""Predicts how long a prefill step, a decode step and a KV transfer take, from a profile.

The policies ask it for urgency and slack; in the simulator it is the engine. `schedulers.fitting`
makes the coefficients from measured samples. All times are seconds, all lengths tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from schedulers.ledger.rows import Rows

KINDS = ("prefill", "decode", "transfer")
"""What a profile has times of."""

FORMS = ("ragged", "padded")
"""How a decode step reads the contexts of its sequences: see `StepCost`."""

Number = Any
"""A number, or an array of numbers of one shape: these formulas hold elementwise."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds that a step takes: base_s, and what each part of its work adds.

    A step computes some tokens of some sequences. per_token_s: of each token. per_pair_s: of each
    token and each token that it attends to; n tokens after c others attend to n (c + n / 2).
    per_seq_s: of each sequence. per_context_token_s: of each token of the sequences' contexts,
    whose KV is read. What an engine cannot show is 0: one that only prefills shows the first two
    and one that only decodes the last two.

    form: of a decode step, which has one token of each sequence. "ragged" reads each context at its
    own length, "padded" reads every context at the length of the longest. buckets: such a step
    computes a number of sequences that is rounded up to one of these, if there are any. factors:
    how much longer a decode step of each bucket takes than the coefficients say; empty: no longer.
    """

    base_s: float
    per_token_s: float = 0.0
    per_pair_s: float = 0.0
    per_seq_s: float = 0.0
    per_context_token_s: float = 0.0
    form: str = "ragged"
    buckets: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()

    def chunk_s(self, num_tokens: Number, computed: Number) -> Number:
        """What one more chunk adds to a step, after `computed` tokens of the same prompt."""
        n, before = num_tokens, computed
        pairs = self.per_pair_s * (before + 0.5 * n) + self.per_context_token_s
        return self.per_seq_s + n * (self.per_token_s + pairs) + self.per_context_token_s * before

    @property
    def decoded_s(self) -> float:
        """What one more sequence adds to a decode step, but for its context."""
        return self.per_token_s + self.per_seq_s

    @property
    def decoded_context_s(self) -> float:
        """What each token of the context of a sequence adds to a decode step."""
        return self.per_pair_s + self.per_context_token_s


@dataclass(frozen=True, slots=True)
class TransferCost:
    """base_s a request; per_token_s for each token whose KV moves."""

    base_s: float
    per_token_s: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Step and transfer times of one model on one kind of device.

    prefill, decode: of the steps of an instance of that role; of one that does both they are the
    same. kv_capacity_tokens: KV that one decode instance holds.
    """

    prefill: StepCost
    decode: StepCost
    transfer: TransferCost
    kv_capacity_tokens: int

    @classmethod
    def from_profile(cls, profile: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> "CostModel":
        """Reads a profile (DESIGN: "Profile file").

        Its table "step" is of an instance that does both jobs; one of "prefill" or "decode" goes
        before it. Those of older files, with per_token_sq_s, are read too.

        kinds: what must be there. Policies of one role need only the times of that role. The times
        of what is missing are nan, so that no caller takes them for an answer.

        Raises ValueError that names a coefficient which is missing, negative or not finite.
        """
        transfer = _table(profile, "transfer", kinds)
        return cls(
            _step_cost(profile, "prefill", kinds),
            _step_cost(profile, "decode", kinds),
            TransferCost(*_coefficients(transfer, "transfer", "base_s", "per_token_s")),
            _count(profile.get("kv_capacity_tokens"), "kv_capacity_tokens"),
        )

    def prefill_s(self, num_tokens: Number, computed: Number = 0) -> Number:
        """A step of one chunk of `num_tokens`, after `computed` tokens of the same prompt."""
        return self.prefill.base_s + self.chunk_s(num_tokens, computed)

    def chunk_s(self, num_tokens: Number, computed: Number = 0) -> Number:
        """What one more chunk adds to a prefill step that runs anyway."""
        return self.prefill.chunk_s(num_tokens, computed)

    def prefill_step_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        """A step of several chunks, each (num_tokens, computed). No chunks take no time."""
        parts = [self.chunk_s(num_tokens, computed) for num_tokens, computed in chunks]
        return self.prefill.base_s + sum(parts) if parts else 0.0

    def prompt_s(self, num_tokens: Number, computed: Number, max_chunk: int) -> Number:
        """All `num_tokens` that remain of a prompt, in chunks of `max_chunk`."""
        cost, steps = self.prefill, -(-num_tokens // max_chunk)
        # Each chunk but the last reads again, in those after it, what it has written.
        again = (steps - 1) * (computed + 0.5 * max_chunk * steps)
        return (
            steps * cost.base_s
            + self.chunk_s(num_tokens, computed)
            + (steps - 1) * cost.per_seq_s
            + again * cost.per_context_token_s
        )

    def together_s(self, prefill_s: float, decode_s: float) -> float:
        """A step of both, given a step of each; either may be 0: there is none."""
        return prefill_s + decode_s - (self.shared_s if prefill_s and decode_s else 0.0)

    @property
    def shared_s(self) -> float:
        """What a step that prefills and decodes saves beside a step of each: it has one base."""
        return min(self.prefill.base_s, self.decode.base_s)

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
        return factor * (cost.base_s + cost.decoded_s * size + cost.decoded_context_s * tokens)

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

        def scale(table: Any) -> Any:
            names = [each.name for each in fields(table) if each.name.endswith("_s")]
            return replace(table, **{name: factor * getattr(table, name) for name in names})

        prefill, decode, transfer = map(scale, (self.prefill, self.decode, self.transfer))
        return replace(self, prefill=prefill, decode=decode, transfer=transfer)

    def transfer_s(self, num_tokens: int) -> float:
        """Bringing the KV of one request over."""
        return self.transfer.base_s + self.transfer.per_token_s * num_tokens


_UNKNOWN: Mapping[str, Any] = {}


def _table(profile: Mapping[str, Any], name: str, kinds: Sequence[str]) -> Mapping[str, Any]:
    """_UNKNOWN if it is not there, and need not be."""
    table = profile.get(name)
    if table is None and name not in kinds:
        return _UNKNOWN
    if not isinstance(table, Mapping):
        raise ValueError(f"profile {name} must be a table of coefficients, got {table!r}")
    return table


# What a table must have; what else it has counts too.
_NEEDED = {
    "step": ("per_token_s", "per_pair_s", "per_seq_s", "per_context_token_s"),
    "prefill": ("per_token_s", "per_pair_s"),
    "decode": ("per_seq_s", "per_context_token_s"),
}


def _step_cost(profile: Mapping[str, Any], kind: str, kinds: Sequence[str]) -> StepCost:
    name = "step" if kind not in profile and "step" in profile else kind
    table = _table(profile, name, kinds)
    if table is _UNKNOWN:
        nan = math.nan
        return StepCost(nan, nan, nan, nan, nan)
    if "per_token_sq_s" in table:  # of both tokens of a pair in the same chunk
        (square,) = _coefficients(table, name, "per_token_sq_s")
        table = {**table, "per_pair_s": 2 * square}
    needed = ("base_s", *_NEEDED[name])
    others = [each for each in _NEEDED["step"] if each in table and each not in needed]
    values = dict(
        zip((*needed, *others), _coefficients(table, name, *needed, *others), strict=True)
    )
    form = table.get("form", "ragged")
    if form not in FORMS:
        raise ValueError(f'profile {name}.form must be "ragged" or "padded", got {form!r}')
    buckets, factors = _buckets(name, table.get("buckets", ()), table.get("factors", ()))
    if form == "ragged" and not factors:
        buckets = ()  # files from before ragged steps had factors: buckets did not count there
    return StepCost(**values, form=form, buckets=buckets, factors=factors)


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


def _buckets(table: str, sizes: Any, factors: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Buckets and factors of a table of a profile, by size."""
    for name, values in (("buckets", sizes), ("factors", factors)):
        if not isinstance(values, list | tuple):
            raise ValueError(f"profile {table}.{name} must be a list, got {values!r}")
    if factors and len(factors) != len(sizes):
        raise ValueError(f"profile {table}.factors must be as many as buckets, got {factors!r}")
    for value in factors:
        if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"profile {table}.factors must be positive, got {value!r}")
    counts = [_count(size, f"{table}.buckets") for size in sizes]
    order = sorted(range(len(counts)), key=counts.__getitem__)
    return tuple(counts[i] for i in order), tuple(float(factors[i]) for i in order if factors)


def _count(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"profile {name} must be a whole number of at least 1, got {value!r}")
    return value
