"""SLOs as HTTP clients and gateways give them: in milliseconds, in the body or in headers."""

import difflib
import math
from collections.abc import Mapping

from kairos_jax.api.http.body.fields import Fields, shown
from kairos_jax.api.refusal import BadField
from kairos_jax.rpc import kairos_pb2 as pb

_FIELDS = {"ttft_ms": "ttft_s", "tpot_ms": "tpot_s"}
# Of llm-d's gateway, which has renamed its headers: the later name wins, for each objective alone.
_HEADERS = ("x-slo-", "x-llm-d-slo-")


def slo_of_headers(headers: Mapping[str, str]) -> pb.Slo:
    """The SLO in `x-slo-ttft-ms`, `x-llm-d-slo-ttft-ms` and the like for the TPOT. Raises BadField,
    also for a header that does not win.
    """
    slo = pb.Slo()
    for prefix in _HEADERS:
        for name, field in _FIELDS.items():
            header = f"{prefix}{name.replace('_', '-')}"
            if (given := headers.get(header)) is not None:
                try:
                    value = float(given)
                except ValueError:
                    raise BadField(header, f"must be a number, got {shown(given)}") from None
                setattr(slo, field, _seconds(header, value))
    return slo


def near_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers with the beginning of those of an SLO that are none, each with the one it is near."""
    near = []
    for prefix in _HEADERS:
        known = [f"{prefix}{name.replace('_', '-')}" for name in _FIELDS]
        for name in headers:
            if name.startswith(prefix) and name not in known:
                near += [(name, each) for each in difflib.get_close_matches(name, known, 1)]
    return near


def slo_of_body(fields: Fields, of_headers: pb.Slo) -> pb.Slo:
    """What the field `slo` says, and for what it leaves out, the headers. Raises BadField."""
    slo, given = pb.Slo(), fields.part("slo")
    slo.CopyFrom(of_headers)
    for name in given.values:
        if name not in _FIELDS:
            raise BadField(f"slo.{name}", f"is not known; {' and '.join(_FIELDS)} are")
    for name, field in _FIELDS.items():
        if (value := given.number(name)) is not None:
            setattr(slo, field, _seconds(f"slo.{name}", value))
    return slo


def _seconds(field: str, milliseconds: float) -> float:
    if not (math.isfinite(milliseconds) and milliseconds > 0):
        raise BadField(field, f"must be a positive number of milliseconds, got {milliseconds:g}")
    return milliseconds / 1000
