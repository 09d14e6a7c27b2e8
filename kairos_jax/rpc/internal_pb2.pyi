from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToWorker(_message.Message):
    __slots__ = ("hello", "submit", "handover", "release", "cancel", "prefetch", "stay", "go_on", "recall", "ping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    STAY_FIELD_NUMBER: _ClassVar[int]
    GO_ON_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Request
    handover: Handover
    release: str
    cancel: str
    prefetch: Prefetch
    stay: Place
    go_on: Place
    recall: Place
    ping: Ping
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Request, _Mapping]] = ..., handover: _Optional[_Union[Handover, _Mapping]] = ..., release: _Optional[str] = ..., cancel: _Optional[str] = ..., prefetch: _Optional[_Union[Prefetch, _Mapping]] = ..., stay: _Optional[_Union[Place, _Mapping]] = ..., go_on: _Optional[_Union[Place, _Mapping]] = ..., recall: _Optional[_Union[Place, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Prefetch(_message.Message):
    __slots__ = ("ticket", "prompt")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    prompt: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., prompt: _Optional[_Iterable[int]] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("id", "why")
    ID_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    id: str
    why: str
    def __init__(self, id: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("welcome", "stepped", "moved", "lost", "died", "outlined", "returned", "draining", "pong", "offered", "failed", "parked", "kept")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    DIED_FIELD_NUMBER: _ClassVar[int]
    OUTLINED_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    stepped: Stepped
    moved: Moved
    lost: Lost
    died: Died
    outlined: Outlined
    returned: Returned
    draining: Draining
    pong: Pong
    offered: Offered
    failed: Failed
    parked: Offered
    kept: str
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., stepped: _Optional[_Union[Stepped, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., lost: _Optional[_Union[Lost, _Mapping]] = ..., died: _Optional[_Union[Died, _Mapping]] = ..., outlined: _Optional[_Union[Outlined, _Mapping]] = ..., returned: _Optional[_Union[Returned, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., offered: _Optional[_Union[Offered, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., parked: _Optional[_Union[Offered, _Mapping]] = ..., kept: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router", "version", "oldest")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    router: str
    version: int
    oldest: int
    def __init__(self, router: _Optional[str] = ..., version: _Optional[int] = ..., oldest: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pong(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("waiting", "running", "parked", "used_pages", "num_pages", "parked_tokens", "parked_limit", "steps", "measured_s", "predicted_s", "sequences", "begun")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    USED_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PARKED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARKED_LIMIT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    running: int
    parked: int
    used_pages: int
    num_pages: int
    parked_tokens: float
    parked_limit: float
    steps: int
    measured_s: float
    predicted_s: float
    sequences: int
    begun: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, waiting: _Optional[int] = ..., running: _Optional[int] = ..., parked: _Optional[int] = ..., used_pages: _Optional[int] = ..., num_pages: _Optional[int] = ..., parked_tokens: _Optional[float] = ..., parked_limit: _Optional[float] = ..., steps: _Optional[int] = ..., measured_s: _Optional[float] = ..., predicted_s: _Optional[float] = ..., sequences: _Optional[int] = ..., begun: _Optional[_Iterable[str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("instance", "incarnation", "role", "model", "fingerprint", "dtype", "limits", "profile_json", "mesh_size", "device_kind", "kv_address", "prefix_cache", "version", "fluid")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_JSON_FIELD_NUMBER: _ClassVar[int]
    MESH_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FLUID_FIELD_NUMBER: _ClassVar[int]
    instance: str
    incarnation: str
    role: str
    model: str
    fingerprint: str
    dtype: str
    limits: Limits
    profile_json: str
    mesh_size: int
    device_kind: str
    kv_address: str
    prefix_cache: bool
    version: int
    fluid: bool
    def __init__(self, instance: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., profile_json: _Optional[str] = ..., mesh_size: _Optional[int] = ..., device_kind: _Optional[str] = ..., kv_address: _Optional[str] = ..., prefix_cache: _Optional[bool] = ..., version: _Optional[int] = ..., fluid: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_batch", "max_chunk", "max_context", "page_size", "num_pages", "parked_tokens")
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PARKED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_batch: int
    max_chunk: int
    max_context: int
    page_size: int
    num_pages: int
    parked_tokens: float
    def __init__(self, max_batch: _Optional[int] = ..., max_chunk: _Optional[int] = ..., max_context: _Optional[int] = ..., page_size: _Optional[int] = ..., num_pages: _Optional[int] = ..., parked_tokens: _Optional[float] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "age_s", "prompt", "max_tokens", "ttft_s", "tpot_s", "stop", "sampling", "serial", "trace")
    class TraceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    id: str
    age_s: float
    prompt: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    ttft_s: float
    tpot_s: float
    stop: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    serial: int
    trace: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., age_s: _Optional[float] = ..., prompt: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., stop: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., serial: _Optional[int] = ..., trace: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs", "prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    logprobs: int
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("request", "tokens", "first_token_age_s", "ticket")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_AGE_S_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    request: Request
    tokens: _containers.RepeatedScalarFieldContainer[int]
    first_token_age_s: float
    ticket: Ticket
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., tokens: _Optional[_Iterable[int]] = ..., first_token_age_s: _Optional[float] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("request_id", "num_tokens", "uuid", "address")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    num_tokens: int
    uuid: int
    address: str
    def __init__(self, request_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., uuid: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class Stepped(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    def __init__(self, outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("id", "token", "logprob", "top", "begun_age_s", "age_s", "finish_reason", "ticket", "cached", "prompt")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    BEGUN_AGE_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    token: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[Alternative]
    begun_age_s: float
    age_s: float
    finish_reason: str
    ticket: Ticket
    cached: int
    prompt: PromptLogprobs
    def __init__(self, id: _Optional[str] = ..., token: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., begun_age_s: _Optional[float] = ..., age_s: _Optional[float] = ..., finish_reason: _Optional[str] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., cached: _Optional[int] = ..., prompt: _Optional[_Union[PromptLogprobs, _Mapping]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("logprobs", "top_ids", "top_logprobs")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("token", "logprob")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token: int
    logprob: float
    def __init__(self, token: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Offered(_message.Message):
    __slots__ = ("id", "ticket")
    ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    id: str
    ticket: Ticket
    def __init__(self, id: _Optional[str] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("id", "age_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    age_s: float
    def __init__(self, id: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...

class Lost(_message.Message):
    __slots__ = ("id", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    error: str
    def __init__(self, id: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("id", "cause", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    cause: str
    error: str
    def __init__(self, id: _Optional[str] = ..., cause: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class Died(_message.Message):
    __slots__ = ("error", "aboard")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ABOARD_FIELD_NUMBER: _ClassVar[int]
    error: str
    aboard: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, error: _Optional[str] = ..., aboard: _Optional[_Iterable[str]] = ...) -> None: ...

class Outlined(_message.Message):
    __slots__ = ("free_s", "due_in_s", "ahead_s", "pace", "load", "room", "num_received", "end_s", "parked_room", "receives", "flows", "num_late", "late", "spare")
    FREE_S_FIELD_NUMBER: _ClassVar[int]
    DUE_IN_S_FIELD_NUMBER: _ClassVar[int]
    AHEAD_S_FIELD_NUMBER: _ClassVar[int]
    PACE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    NUM_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    PARKED_ROOM_FIELD_NUMBER: _ClassVar[int]
    RECEIVES_FIELD_NUMBER: _ClassVar[int]
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    NUM_LATE_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    free_s: float
    due_in_s: _containers.RepeatedScalarFieldContainer[float]
    ahead_s: _containers.RepeatedScalarFieldContainer[float]
    pace: float
    load: float
    room: float
    num_received: int
    end_s: float
    parked_room: float
    receives: bool
    flows: bool
    num_late: int
    late: _containers.RepeatedScalarFieldContainer[str]
    spare: float
    def __init__(self, free_s: _Optional[float] = ..., due_in_s: _Optional[_Iterable[float]] = ..., ahead_s: _Optional[_Iterable[float]] = ..., pace: _Optional[float] = ..., load: _Optional[float] = ..., room: _Optional[float] = ..., num_received: _Optional[int] = ..., end_s: _Optional[float] = ..., parked_room: _Optional[float] = ..., receives: _Optional[bool] = ..., flows: _Optional[bool] = ..., num_late: _Optional[int] = ..., late: _Optional[_Iterable[str]] = ..., spare: _Optional[float] = ...) -> None: ...

class Returned(_message.Message):
    __slots__ = ("id", "ticket")
    ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    id: str
    ticket: Ticket
    def __init__(self, id: _Optional[str] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
