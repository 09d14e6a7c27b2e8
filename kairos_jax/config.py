"""What is served: a config file's values, checked and frozen.

A config file (configs/NAME.py) returns a ConfigDict with every key of `ServerConfig`; flags
override single keys. Whatever is unknown, missing or out of range is refused by its name.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.ops import KERNELS
from models.sharding import MESH_AXES, Rules
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.request import Slo
from schedulers.policies import decode, prefill

DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A config value that cannot be served; the message names key, value and limit."""


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """The instances of one role. instances: how many; devices: size of each one's mesh; kv_tokens:
    tokens whose KV the pool of each holds.
    """

    instances: int
    devices: int
    policy: str
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillConfig(InstanceConfig):
    """parked_tokens: tokens whose KV may wait, outside of the pool, for decode. max_chunk: prompt
    tokens a step; row_tokens: a chunk is padded to a multiple of it. pack: base costs of a step
    that other prompts may add to it (`schedulers.policies.prefill`). prefix_cache: whether prompts
    that begin alike share the pages of what they have in common.
    """

    parked_tokens: int
    max_chunk: int
    row_tokens: int
    pack: float
    prefix_cache: bool


@dataclass(frozen=True, slots=True)
class DecodeConfig(InstanceConfig):
    """max_batch: sequences a step. prefix_cache: whether prompts that begin alike share pages here
    too, so that what they have in common is sent once.
    """

    max_batch: int
    prefix_cache: bool


@dataclass(frozen=True, slots=True)
class SloConfig:
    """The SLO of requests that state none, seconds."""

    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """A server: a model on one or more prefill and decode meshes.

    model: path, hub id or the default model's name. kernels: see `models.ops.KERNELS`; "auto": the
    fastest that run here. rules: which logical axes of weights and KV are split over which axis of
    a mesh; those that are not named are whole on each device. max_context: prompt and output
    together, at most; max_tokens: output, at most. max_requests: in progress at once; more are
    rejected.
    colocated: the prefill instances decode too, with decode's max_batch, kv_tokens and policy;
    there are no decode instances then.
    """

    model: str
    dtype: str
    kernels: str
    rules: Rules
    max_context: int
    max_tokens: int
    max_requests: int
    page_size: int
    colocated: bool
    prefill: PrefillConfig
    decode: DecodeConfig
    slo: SloConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ServerConfig":
        """Raises ConfigError for an unknown or missing key, a wrong type or a bad value."""
        config = _build(cls, values, "")
        _check(config)
        return config

    @property
    def default_slo(self) -> Slo:
        return Slo(self.slo.ttft, self.slo.tpot)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of each instance, in the order in which they get their devices."""
        if self.colocated:
            return (Role.BOTH,) * self.prefill.instances
        return (Role.PREFILL,) * self.prefill.instances + (Role.DECODE,) * self.decode.instances

    @property
    def names(self) -> tuple[str, ...]:
        """An id for each instance: its role, and its number among those of its role."""
        words = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "colocated"}
        roles = self.roles
        return tuple(f"{words[role]}-{roles[:i].count(role)}" for i, role in enumerate(roles))

    @property
    def num_devices(self) -> int:
        """Devices of all instances."""
        return sum(self.devices(role) for role in self.roles)

    @property
    def layout(self) -> str:
        """Instances and devices in words, such as "2 x 1 prefill + 1 x 4 decode"."""
        prefill, decode = self.prefill, self.decode
        if self.colocated:
            return f"{prefill.instances} x {prefill.devices} colocated"
        return (
            f"{prefill.instances} x {prefill.devices} prefill + "
            f"{decode.instances} x {decode.devices} decode"
        )

    def devices(self, role: Role) -> int:
        """Devices of one instance."""
        return self.decode.devices if role is Role.DECODE else self.prefill.devices

    def limits(self, role: Role) -> Limits:
        """What the ledger of an instance can hold."""
        prefill, decode = self.prefill, self.decode
        kv_tokens = prefill.kv_tokens if role is Role.PREFILL else decode.kv_tokens
        # A prompt fills a row of a prefill step at least.
        prompts = prefill.max_chunk // prefill.row_tokens
        return Limits(
            max_batch=prompts if role is Role.PREFILL else decode.max_batch,
            max_chunk=1 if role is Role.DECODE else prefill.max_chunk,
            max_context=self.max_context,
            page_size=self.page_size,
            num_pages=kv_tokens // self.page_size,
            parked_tokens=prefill.parked_tokens if role is Role.PREFILL else math.inf,
        )


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"config.{path}{unknown[0]} is not a key; known: {', '.join(fields)}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise ConfigError(f"config.{path}{missing[0]} is missing")
    made = {name: _value(kind, values[name], path + name) for name, kind in fields.items()}
    return cls(**made)


def _value(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, InstanceConfig | SloConfig):
        return _build(kind, dict(value), path + ".")
    if kind is Rules:
        return _rules(dict(value), path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    assert isinstance(kind, type)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ConfigError(f"config.{path} must be of type {kind.__name__}, got {value!r}")
    return value


def _rules(values: Mapping[str, str | None], path: str) -> Rules:
    known = [field.name for field in dataclasses.fields(Rules)]
    for axis, part in values.items():
        if axis not in known:
            raise ConfigError(
                f"config.{path}.{axis} is not a logical axis; known: {', '.join(known)}"
            )
        if part and part not in MESH_AXES:
            raise ConfigError(
                f"config.{path}.{axis} must be an axis of the mesh ({', '.join(MESH_AXES)}) "
                f"or empty, got {part!r}"
            )
    rules = Rules(**{axis: values.get(axis) or None for axis in known})
    if rules.heads != rules.kv_heads:  # each q head is to meet its kv head
        raise ConfigError(
            f"config.{path}.kv_heads must be as {path}.heads, {rules.heads!r}, "
            f"got {rules.kv_heads!r}"
        )
    return rules


def _check(config: ServerConfig) -> None:
    at_least_one = {
        "max_context": config.max_context,
        "max_tokens": config.max_tokens,
        "max_requests": config.max_requests,
        "page_size": config.page_size,
        "prefill.instances": config.prefill.instances,
        "prefill.devices": config.prefill.devices,
        "prefill.max_chunk": config.prefill.max_chunk,
        "prefill.row_tokens": config.prefill.row_tokens,
        "decode.instances": config.decode.instances,
        "decode.devices": config.decode.devices,
        "decode.max_batch": config.decode.max_batch,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"config.{name} must be at least 1, got {value}")
    choices = {
        "dtype": (config.dtype, DTYPES),
        "kernels": (config.kernels, ("auto", *KERNELS)),
        "prefill.policy": (config.prefill.policy, tuple(prefill.POLICIES)),
        "decode.policy": (config.decode.policy, tuple(decode.POLICIES)),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"config.{name} must be one of {', '.join(known)}, got {value!r}")
    for name, value in (("slo.ttft", config.slo.ttft), ("slo.tpot", config.slo.tpot)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"config.{name} must be a positive number of seconds, got {value}")
    if not config.prefill.pack >= 0:
        raise ConfigError(f"config.prefill.pack must be at least 0, got {config.prefill.pack}")
    if config.max_tokens >= config.max_context:
        raise ConfigError(
            f"config.max_tokens must be below max_context {config.max_context}, "
            f"got {config.max_tokens}"
        )
    # Else the longest request could never get its pages, and would wait for ever.
    for name, tokens in (
        ("prefill.kv_tokens", config.prefill.kv_tokens),
        ("decode.kv_tokens", config.decode.kv_tokens),
    ):
        pages = -(-config.max_context // config.page_size)
        if tokens // config.page_size < pages:
            raise ConfigError(
                f"config.{name} must hold max_context {config.max_context} in whole pages of "
                f"{config.page_size}, got {tokens}"
            )
    if config.prefill.parked_tokens < config.max_context:
        raise ConfigError(
            f"config.prefill.parked_tokens must be at least max_context {config.max_context}, "
            f"got {config.prefill.parked_tokens}"
        )
    if config.prefill.max_chunk % config.prefill.row_tokens:
        raise ConfigError(
            f"config.prefill.max_chunk must be a multiple of row_tokens "
            f"{config.prefill.row_tokens}, got {config.prefill.max_chunk}"
        )
