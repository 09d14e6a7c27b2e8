from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Claimant(_message.Message):
    __slots__ = ("identity", "nonce")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    identity: int
    nonce: int
    def __init__(self, identity: _Optional[int] = ..., nonce: _Optional[int] = ...) -> None: ...

class ClaimRequest(_message.Message):
    __slots__ = ("uuid", "request_id", "claimant", "as_bytes", "first")
    UUID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLAIMANT_FIELD_NUMBER: _ClassVar[int]
    AS_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    uuid: int
    request_id: str
    claimant: Claimant
    as_bytes: bool
    first: int
    def __init__(self, uuid: _Optional[int] = ..., request_id: _Optional[str] = ..., claimant: _Optional[_Union[Claimant, _Mapping]] = ..., as_bytes: _Optional[bool] = ..., first: _Optional[int] = ...) -> None: ...

class ClaimResponse(_message.Message):
    __slots__ = ("manifest", "part", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    part: Part
    chunk: bytes
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("model", "fingerprint", "dtype", "page_size", "block_shape", "num_tokens", "num_blocks", "shards", "transfer_address", "incarnation")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SHAPE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    dtype: str
    page_size: int
    block_shape: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: int
    num_blocks: int
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    transfer_address: str
    incarnation: int
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., page_size: _Optional[int] = ..., block_shape: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., transfer_address: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: _containers.RepeatedScalarFieldContainer[int]
    stop: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[_Iterable[int]] = ..., stop: _Optional[_Iterable[int]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("num_blocks", "uuid")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    uuid: int
    def __init__(self, num_blocks: _Optional[int] = ..., uuid: _Optional[int] = ...) -> None: ...

class DeliveredRequest(_message.Message):
    __slots__ = ("uuid", "claimant")
    UUID_FIELD_NUMBER: _ClassVar[int]
    CLAIMANT_FIELD_NUMBER: _ClassVar[int]
    uuid: int
    claimant: Claimant
    def __init__(self, uuid: _Optional[int] = ..., claimant: _Optional[_Union[Claimant, _Mapping]] = ...) -> None: ...

class DeliveredResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
