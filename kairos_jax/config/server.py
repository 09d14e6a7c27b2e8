"""What is served: every key of a config is declared here, with its type, range and meaning.

A config file (configs/NAME.py) returns the values of the keys; flags override single keys. A key
that has a default may be left out. What is unknown, missing or out of range is refused by its name.
`keys.py` makes the reference from these declarations.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from kairos_jax.config.chips import CHIPS
from models.ops import KERNELS
from models.sharding import MESH_AXES, Rules
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.request import Slo
from schedulers.policies import decode, prefill

DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A config that cannot be served; the message names key, value and limit."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a key means, and which values of its type it takes. least: of a number; positive: above
    0 and finite; choices: of a string; limits: the range in words, where other keys decide it.
    """

    meaning: str
    least: int | None = None
    positive: bool = False
    choices: tuple[str, ...] = ()
    limits: str = ""

    @property
    def range(self) -> str:
        """In words."""
        if self.choices:
            return ", ".join(choice or "empty" for choice in self.choices)
        if self.positive:
            return "above 0"
        return self.limits or ("" if self.least is None else f"at least {self.least}")

    def check(self, value: Any, path: str) -> None:
        """Raises ConfigError."""
        if self.choices and value not in self.choices:
            raise ConfigError(f"config.{path} must be one of {self.range}, got {value!r}")
        if self.positive and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"config.{path} must be a positive number of seconds, got {value}")
        if self.least is not None and not value >= self.least:
            raise ConfigError(f"config.{path} must be at least {self.least}, got {value}")


_HOLDS_ONE = "at least max_context in whole pages"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceConfig:
    """The instances of one role."""

    instances: Annotated[int, Key("Instances of this role.", least=1)] = 1
    devices: Annotated[int, Key("Devices of each instance: the size of its mesh.", least=1)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(InstanceConfig):
    """Prefill instances; if colocated, the instances."""

    policy: Annotated[
        str, Key("Order in which prompts are computed.", choices=tuple(prefill.POLICIES))
    ] = "kairos_plus"
    kv_tokens: Annotated[
        int,
        Key(
            "Tokens whose KV the pool of each instance holds. Unused: colocated.", limits=_HOLDS_ONE
        ),
    ]
    parked_tokens: Annotated[
        int,
        Key(
            "Tokens whose KV may wait for decode outside of the pool. Unused: colocated.",
            limits="at least max_context",
        ),
    ]
    max_chunk: Annotated[
        int,
        Key("Prompt tokens of a step, at most.", least=1),
    ]
    pack: Annotated[
        float,
        Key(
            "Most cost that further prompts may add to a step, as a multiple of its base cost. "
            "0: never pack. inf: no limit.",
            least=0,
        ),
    ] = math.inf
    prefix_cache: Annotated[
        bool, Key("Prompts that begin alike share the pages of their common beginning.")
    ] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(InstanceConfig):
    """Decode instances; if colocated, how the instances decode."""

    policy: Annotated[
        str,
        Key("Which sequences a decode step serves.", choices=tuple(decode.POLICIES)),
    ] = "kairos_plus"
    kv_tokens: Annotated[
        int, Key("Tokens whose KV the pool of each instance holds.", limits=_HOLDS_ONE)
    ]
    max_batch: Annotated[int, Key("Sequences of a step, at most; of a prefill step too.", least=1)]
    prefix_cache: Annotated[
        bool, Key("As prefill.prefix_cache; a common beginning is then sent to decode only once.")
    ] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """The SLO of requests that state none."""

    ttft: Annotated[float, Key("Default SLO: seconds to the first token.", positive=True)]
    tpot: Annotated[
        float, Key("Default SLO: seconds for each token after the first.", positive=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """A server: a model on one or more prefill and decode meshes."""

    model: Annotated[str, Key("Path, Hugging Face id, or name of a packaged model.")]
    served_model_name: Annotated[
        str, Key("What the APIs and metrics call the model. Empty: the last part of model.")
    ] = ""
    dtype: Annotated[str, Key("Type of weights, activations and KV.", choices=DTYPES)]
    kernels: Annotated[
        str,
        Key("Kernels of attention. auto: the fastest that run here.", choices=("auto", *KERNELS)),
    ] = "auto"
    rules: Annotated[
        Rules,
        Key(
            "Mesh axis that {axis} of weights and KV is split over. Empty: none.",
            choices=("", *MESH_AXES),
        ),
    ] = field(default_factory=Rules)
    chip: Annotated[
        str,
        Key(
            "Accelerator that the sizes are for: `kairos plan` uses it. Empty: none.",
            choices=("", *CHIPS),
        ),
    ] = ""
    max_context: Annotated[
        int,
        Key("Tokens of prompt and output together, at most.", least=1, limits="1 to the model's"),
    ]
    max_tokens: Annotated[
        int, Key("Tokens of an output, at most.", least=1, limits="1 to max_context - 1")
    ]
    max_requests: Annotated[
        int, Key("Requests in progress, at most. Further ones are refused.", least=1)
    ] = 1024
    page_size: Annotated[int, Key("Tokens of a KV page.", least=1)] = 64
    colocated: Annotated[
        bool,
        Key(
            "The prefill instances decode too, with the policy, kv_tokens and max_batch of decode; "
            "there are no decode instances."
        ),
    ] = False
    fluid: Annotated[
        bool,
        Key(
            "Roles flow: every instance prefills and decodes, as the load needs, with the "
            "kv_tokens and max_batch of decode. How many instances prefill and decode says where "
            "they begin."
        ),
    ] = False
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
    def name(self) -> str:
        """What the APIs call the model."""
        return self.served_model_name or Path(self.model).name

    @property
    def default_slo(self) -> Slo:
        return Slo(self.slo.ttft, self.slo.tpot)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of each instance, in the order in which they get their devices."""
        return tuple(map(self.role, self.begins))

    @property
    def begins(self) -> tuple[Role, ...]:
        """With which job each instance begins. Where roles do not flow, that is its role."""
        if self.colocated:
            return (Role.BOTH,) * self.prefill.instances
        return (Role.PREFILL,) * self.prefill.instances + (Role.DECODE,) * self.decode.instances

    def role(self, begins: Role) -> Role:
        """Of an instance that begins with a job."""
        return Role.BOTH if self.fluid else begins

    @property
    def names(self) -> tuple[str, ...]:
        """An id for each instance: where it begins, and its number among those that begin there."""
        words = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "colocated"}
        begins = self.begins
        return tuple(f"{words[role]}-{begins[:i].count(role)}" for i, role in enumerate(begins))

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
            f"{decode.instances} x {decode.devices} decode{' (fluid)' if self.fluid else ''}"
        )

    def devices(self, role: Role) -> int:
        """Devices of one instance."""
        return self.decode.devices if role is Role.DECODE else self.prefill.devices

    def limits(self, role: Role) -> Limits:
        """What the ledger of an instance can hold."""
        prefill, decode = self.prefill, self.decode
        hands_over = role is Role.PREFILL or (self.fluid and role is Role.BOTH)
        kv_tokens = prefill.kv_tokens if role is Role.PREFILL else decode.kv_tokens
        return Limits(
            max_batch=decode.max_batch,
            max_chunk=1 if role is Role.DECODE else prefill.max_chunk,
            max_context=self.max_context,
            page_size=self.page_size,
            num_pages=kv_tokens // self.page_size,
            parked_tokens=prefill.parked_tokens if hands_over else math.inf,
        )


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    fields = {each.name: each for each in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"config.{path}{unknown[0]} is not a key; known: {', '.join(fields)}")
    made = {}
    for name, each in fields.items():
        if name in values:
            made[name] = _value(each.type, values[name], path + name)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"config.{path}{name} is missing")
    return cls(**made)


def _value(declared: Any, value: Any, path: str) -> Any:
    kind, key = get_args(declared) or (declared, Key(""))
    if kind is Rules or issubclass(kind, InstanceConfig | SloConfig):
        try:
            table = dict(value)
        except (TypeError, ValueError):
            raise ConfigError(f"config.{path} must be a table of keys, got {value!r}") from None
        return _rules(table, path) if kind is Rules else _build(kind, table, path + ".")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ConfigError(f"config.{path} must be of type {kind.__name__}, got {value!r}")
    key.check(value, path)
    return value


def _rules(values: Mapping[str, str | None], path: str) -> Rules:
    known = [each.name for each in dataclasses.fields(Rules)]
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
    """What a key must be because of others."""
    if config.max_tokens >= config.max_context:
        raise ConfigError(
            f"config.max_tokens must be below max_context {config.max_context}, "
            f"got {config.max_tokens}"
        )
    if config.fluid and config.colocated:
        raise ConfigError("config.fluid must be False where config.colocated is True, got True")
    if config.fluid and config.prefill.devices != config.decode.devices:
        raise ConfigError(
            f"config.decode.devices must be as prefill.devices, {config.prefill.devices}, where "
            f"config.fluid is True, got {config.decode.devices}"
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
