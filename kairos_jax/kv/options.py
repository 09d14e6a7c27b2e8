"""How KV moves between processes: the flags that say so."""

from dataclasses import dataclass

from absl import flags

from kairos_jax.net.address import is_wildcard, split_address

_MIB = 1 << 20


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    default = TransferOptions()
    flags.DEFINE_enum(
        "kv_transport", default.kind, ["jax", "grpc"], "How KV is received from other processes."
    )
    flags.DEFINE_string(
        "kv_host", "", "Address on which the transfer server listens; default: --host."
    )
    flags.DEFINE_float(
        "kv_lease_s", default.lease_s, "Seconds after which unclaimed KV is freed.", 0.1
    )
    flags.DEFINE_float(
        "kv_claim_s", default.claim_s, "Seconds after which KV that was not fetched is freed.", 0.1
    )
    flags.DEFINE_float(
        "kv_fetch_s", default.fetch_s, "Seconds without progress after which a KV fetch fails.", 0.1
    )
    for name, text in (
        ("in_flight", "Most MiB in flight from one peer."),
        ("staged", "Most MiB fetched before the pool has room for them."),
        ("urgent", "KV of at most this many MiB goes ahead of larger KV."),
        ("transfer", "Size of one piece of the transfer server, in MiB."),
    ):
        value = getattr(default, f"{name}_bytes") // _MIB
        flags.DEFINE_integer(f"kv_{name}_mib", value, text, 0 if name == "staged" else 1)
    flags.DEFINE_integer(
        "kv_parallel_copies", default.parallel_copies, "Pieces that are copied at once.", 1
    )


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """kind: "jax" or "grpc". host: where the transfer server listens; "", or one that stands for
    all addresses: the host by which peers reach this process.

    lease_s: how long an offer is kept that nobody claims; one that is claimed, `claim_s` from the
    last that was added to it. fetch_s: fails a fetch of which nothing comes for so long.
    in_flight_bytes: from one peer.
    staged_bytes: brought over ahead of fetches, from all peers. urgent_bytes: fetches of no more
    than that go before others. transfer_bytes, parallel_copies: the transfer server's pieces; their
    product is host memory that it sets aside.
    """

    kind: str = "jax"
    host: str = ""
    lease_s: float = 600.0
    claim_s: float = 120.0
    fetch_s: float = 10.0
    in_flight_bytes: int = 256 * _MIB
    staged_bytes: int = 1024 * _MIB
    urgent_bytes: int = 8 * _MIB
    transfer_bytes: int = 4 * _MIB
    parallel_copies: int = 8

    def listens_on(self, address: str) -> str:
        """The transfer server's host, in a process that peers reach at `address`."""
        host = self.host.strip("[]")
        return split_address(address)[0] if not host or is_wildcard(host) else host

    @classmethod
    def from_flags(cls, host: str) -> "TransferOptions":
        """host: where the process listens."""
        values = flags.FLAGS
        return cls(
            values.kv_transport,
            values.kv_host or host,
            values.kv_lease_s,
            values.kv_claim_s,
            values.kv_fetch_s,
            values.kv_in_flight_mib * _MIB,
            values.kv_staged_mib * _MIB,
            values.kv_urgent_mib * _MIB,
            values.kv_transfer_mib * _MIB,
            values.kv_parallel_copies,
        )
