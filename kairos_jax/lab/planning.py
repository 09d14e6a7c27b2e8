"""What a deployment needs of its chips, and how long its steps would take, by shapes alone.

A step takes the longer of two times: its operations at the chip's peak, and the bytes it moves at
the chip's bandwidth, each at the share of it that is reached in practice. The time of collectives,
and what the host adds, come on top.
"""

import dataclasses
import datetime
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from kairos_jax import __version__
from kairos_jax.config import ConfigError, ServerConfig
from kairos_jax.config.chips import Chip
from kairos_jax.engine.configure import device_bytes
from kairos_jax.engine.functions import bucket_sizes
from kairos_jax.process.command import UsageError
from models.config import ModelConfig
from models.ops import KERNELS
from schedulers import fitting
from schedulers.ledger.instance import Role

# Beside weights and pool, until a compiler says more: activations and logits.
_TEMPORARIES = 256 << 20
_LATENCY_S = 5e-6  # of a collective, however small


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of what a chip states is reached in practice, and what the host adds to each step,
    in seconds. Assumptions, to be set by what was measured.
    """

    bandwidth: float = 0.8
    flops: float = 0.6
    link: float = 0.7
    host_s: float = 1e-3

    def __str__(self) -> str:
        return (
            f"{self.bandwidth:.0%} of bandwidth, {self.flops:.0%} of operations, {self.link:.0%} "
            f"of links, {1e3 * self.host_s:g} ms of the host a step"
        )


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of each device of an instance. token: the KV of one token. temporaries: an estimate,
    unless a compiler said.
    """

    role: Role
    devices: int
    weights: int
    pool: int
    parked: int
    token: float
    temporaries: int = _TEMPORARIES

    @property
    def total(self) -> int:
        return self.weights + self.pool + self.parked + self.temporaries

    def most_tokens(self, memory: int, page_size: int) -> int:
        """The largest pool that fits, in whole pages."""
        room = memory - self.weights - self.parked - self.temporaries
        return max(math.floor(room / self.token / page_size) * page_size, 0)


def kernels_of(config: ServerConfig, chip: Chip) -> str:
    """The kernels that the config gets on such chips. Raises ConfigError."""
    if config.kernels == "auto":
        return "gpu_hopper" if chip.platform == "gpu" else chip.platform
    if not config.kernels.startswith(chip.platform) and config.kernels != "reference":
        raise ConfigError(
            f"config.kernels must be auto or kernels for a {chip.platform}, got {config.kernels!r}"
        )
    return config.kernels


def needs_of(config: ServerConfig, model: ModelConfig, role: Role, chip: Chip) -> Needs:
    """Raises UsageError: the model cannot be split so, or the kernels do not take it."""
    devices, limits = config.devices(role), config.limits(role)
    if devices > chip.most:
        part = "decode" if role is Role.DECODE else "prefill"
        raise UsageError(
            f"config.{part}.devices must be at most {chip.most}, which a host of {chip.title} has, "
            f"got {devices}"
        )
    name = kernels_of(config, chip)
    try:
        weights, token = device_bytes(
            model, config.dtype, devices, name, config.page_size, config.rules
        )
    except ValueError as error:
        raise UsageError(f"kernels {name}: {error}") from error
    pool = round(token * limits.num_pages * limits.page_size)
    parked = limits.parked_tokens if math.isfinite(limits.parked_tokens) else 0
    return Needs(role, devices, weights, pool, math.ceil(token * parked), token)


def check_fits(config: ServerConfig, needs: Needs, chip: Chip) -> None:
    """Raises ConfigError with the arithmetic."""
    if needs.total <= chip.memory:
        return
    part = "prefill" if needs.role is Role.PREFILL else "decode"
    table = getattr(config, part)
    most = needs.most_tokens(chip.memory, config.page_size)
    parts = {
        "weights": needs.weights,
        f"{table.kv_tokens} tokens of KV": needs.pool,
        "parked KV": needs.parked,
        "temporaries": needs.temporaries,
    }
    said = " + ".join(f"{size / 1e9:.1f} GB of {what}" for what, size in parts.items() if size)
    raise ConfigError(
        f"config.{part}.kv_tokens must be at most {most}, got {table.kv_tokens}: {said} make "
        f"{needs.total / 1e9:.1f} GB, and a {chip.title} gives {chip.memory / 1e9:.1f} GB"
    )


class Counted(NamedTuple):
    """What a compiled step of all layers does on one device, but for its attention: operations of
    products, and bytes moved in main memory.
    """

    tokens: int
    sequences: int
    operations: float
    moved: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Times of steps of one role. `limit_s`: of a chip that reaches all that it states, and of a
    host that adds nothing.

    counted: of the role's compiled steps, one or two; between and beyond them lies a line.
    Attention is reckoned by shapes. So is the rest where nothing was compiled, and for a limit.
    """

    model: ModelConfig
    config: ServerConfig
    needs: Needs
    chip: Chip
    shares: Shares
    counted: Sequence[Counted] = ()

    def decode_s(self, batch: int, context: int) -> float:
        """A step of so many sequences of that context."""
        return self.step_s(batch, context, 0)

    def prefill_s(self, tokens: int, computed: int = 0) -> float:
        """A step of so many tokens of one prompt, after those computed before."""
        return self.step_s(0, 0, tokens, computed)

    def step_s(self, batch: int, context: int, tokens: int, computed: int = 0) -> float:
        """A step of both."""
        return self._seconds(batch, context, tokens, computed)

    def decode_limit_s(self, batch: int, context: int) -> float:
        """As `decode_s`, by what the chip states."""
        return self._at_best()._seconds(batch, context, 0, 0)

    def prefill_limit_s(self, tokens: int, computed: int = 0) -> float:
        """As `prefill_s`, by what the chip states."""
        return self._at_best()._seconds(0, 0, tokens, computed)

    def _at_best(self) -> "Prediction":
        return dataclasses.replace(self, shares=Shares(1, 1, 1, 0), counted=())

    def _seconds(self, batch: int, context: int, tokens: int, computed: int) -> float:
        shares = self.shares
        total, sequences = batch + tokens, batch + (tokens > 0)
        pairs = batch * context + tokens * computed + tokens * (tokens + 1) / 2
        operations, moved = self._apart_from_attention(total, sequences)
        operations += 4 * pairs * self._head_numbers()
        contexts = batch * (context + 1) + computed + tokens
        moved += contexts * self.needs.token
        computing = operations / (self.chip.flops[self.config.dtype] * shares.flops)
        moving = moved / (self.chip.bandwidth * shares.bandwidth)
        exchanging = self._collectives_s(total, sequences, shares.link)
        return max(computing, moving) + exchanging + shares.host_s

    def _apart_from_attention(self, tokens: int, sequences: int) -> tuple[float, float]:
        """Operations, and bytes moved."""
        if not self.counted:
            return 2 * tokens * self._products() + 2 * sequences * self._head(), self._read()
        first, last = self.counted[0], self.counted[-1]
        if first.tokens == last.tokens:  # of decode: other batches have as many products a token
            return first.operations * tokens / first.tokens, first.moved
        way = (tokens - first.tokens) / (last.tokens - first.tokens)
        operations = first.operations + way * (last.operations - first.operations)
        moved = first.moved + way * (last.moved - first.moved)
        # A step of fewer tokens still reads the weights, and computes its sequences' logits.
        return max(operations, 2 * tokens * self._products()), max(moved, self._read())

    def _products(self) -> float:
        """Weights of the layers' products, on one device."""
        model = self.model
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        of_layer = model.hidden_size * (heads * model.head_dim + 3 * model.mlp_size)
        return model.num_layers * of_layer / self.needs.devices

    def _head(self) -> float:
        return self.model.hidden_size * self.model.vocab_size / self.needs.devices

    def _head_numbers(self) -> float:
        """Numbers of all q heads of all layers, on one device."""
        model = self.model
        return model.num_layers * model.num_heads * model.head_dim / self.needs.devices

    def _read(self) -> float:
        """Bytes of the weights that every step reads: of an embedding that is not the head too, a
        few rows.
        """
        return (self._products() + self._head()) * self._itemsize()

    def _itemsize(self) -> int:
        return 2 if self.config.dtype == "bfloat16" else 4

    def _collectives_s(self, tokens: int, sequences: int, share: float) -> float:
        """Two sums a layer and one of the embedding, and the logits made whole."""
        devices, model = self.needs.devices, self.model
        if devices == 1:
            return 0.0
        sums = 2 * model.num_layers + 1
        around = (devices - 1) / devices
        summed = 2 * around * tokens * model.hidden_size * self._itemsize()
        gathered = around * sequences * model.vocab_size * 4
        return (sums * summed + gathered) / (self.chip.link * share) + (sums + 1) * _LATENCY_S


def predict(prefill: Prediction, decode: Prediction) -> dict[str, Any]:
    """A profile of step times (DESIGN: "Profile file") that were not measured, of a config whose
    prompts are computed as the one says and decoded as the other.
    """
    samples: dict[str, Any] = {}
    config, model, chip, shares = prefill.config, prefill.model, prefill.chip, prefill.shares
    # Policies fill their chunks. Shorter ones read the weights for longer than they compute.
    chunks = list(_up_to(config.prefill.max_chunk, least=config.prefill.max_chunk // 4))
    longest = config.max_context
    samples["prefill"] = [
        (tokens, computed, prefill.prefill_s(tokens, computed))
        for tokens, computed in itertools.product(chunks, (0, longest // 4, longest // 2))
    ]
    samples["decode"] = [
        (batch, context, decode.decode_s(batch, context))
        for batch, context in itertools.product(
            _up_to(config.decode.max_batch), (64, longest // 8, longest // 4)
        )
    ]
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    token *= 2 if config.dtype == "bfloat16" else 4
    rate = chip.link * shares.link
    if config.colocated:
        most, longest_chunk = config.decode.max_batch, chunks[-1]
        samples["beside"] = [
            (batch, longest // 8, tokens, decode.step_s(batch, longest // 8, tokens))
            for batch, tokens in itertools.product(
                (most // 8 or 1, most // 2 or 1, most), (longest_chunk // 4 or 1, longest_chunk)
            )
        ]
    samples["transfer"] = [(n, 2 * shares.host_s + n * token / rate) for n in (256, 1024, 4096)]
    kernels = KERNELS[kernels_of(config, chip)]
    fitted = fitting.fit(
        **samples,
        form=kernels.contexts_of(config.dtype, model.head_dim, config.page_size),
    )
    return {
        "name": f"{config.name} on {chip.title}, {config.layout}, predicted",
        "model": config.model,
        "platform": chip.platform,
        "device": chip.title,
        "devices": {"prefill": prefill.needs.devices, "decode": decode.needs.devices},
        "dtype": config.dtype,
        "source": "predicted",
        "assumed": dataclasses.asdict(shares),
        "counted": "by the compiler" if prefill.counted else "by shapes",
        "date": datetime.date.today().isoformat(),
        "versions": {"kairos_jax": __version__, "jax": jax.__version__},
        **fitted,
        "kv_capacity_tokens": config.decode.kv_tokens,
        "samples": samples,
    }


def _up_to(limit: int, least: int = 1) -> Iterable[int]:
    return (size for size in bucket_sizes(limit) if size >= min(least, limit))
