"""Theta, rope scaling and sliding windows of a Hugging Face config.json."""

import reprlib
from collections.abc import Mapping
from typing import Any

from models.checkpoint.fields import Fields
from models.families import Family
from models.rope import RopeScaling

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_window(fields: Fields, family: Family) -> int | None:
    """The sliding window of those layers that have one; None if no layer does.

    fields: of config.json, with the family's defaults.
    """
    layer_types = fields.strings("layer_types")
    if set(layer_types) - {_FULL, _SLIDING}:
        raise fields.error("layer_types", f"a list of {_FULL!r} and {_SLIDING!r}")
    if family.windows == "none":
        return None
    if family.windows == "all":
        return fields.optional_integer("sliding_window")
    num_layers = fields.integer("num_hidden_layers")
    if layer_types and len(layer_types) != num_layers:
        raise fields.error("layer_types", f"a list of num_hidden_layers = {num_layers} items")
    in_use = fields.flag("use_sliding_window")
    window = fields.optional_integer("sliding_window") if in_use else None
    if not layer_types:
        return window if fields.integer("max_window_layers", least=0) < num_layers else None
    if _SLIDING not in layer_types:
        return None
    if window is None:
        raise fields.error(
            "layer_types", f"all {_FULL!r} where use_sliding_window or sliding_window is not set"
        )
    return window


def read_rope(fields: Fields, window: int | None) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from the old keys or from transformers 5's `rope_parameters`.

    window: of `read_window`.
    """
    new, old = fields.object("rope_parameters"), fields.object("rope_scaling")
    if new and old and new != old:
        raise ValueError(
            f"{fields.where}: rope_parameters and rope_scaling differ: {reprlib.repr(new)} and "
            f"{reprlib.repr(old)}"
        )
    key = "rope_parameters" if new else "rope_scaling"
    ropes = {
        name: _read_one(fields, Fields(f"{fields.where}: {key}", rope, prefix))
        for name, prefix, rope in _parts(fields, key, new or old, window)
    }
    if len(set(ropes.values())) > 1:
        raise ValueError(
            f"{fields.where}: {key} differs between {' and '.join(map(repr, ropes))}, which is not "
            "supported"
        )
    return next(iter(ropes.values()))


def _parts(
    fields: Fields, key: str, rope: Mapping[str, Any], window: int | None
) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Name, prefix and values of each rope that layers use: one, or one for each layer type."""
    nested = {name for name in rope if isinstance(rope[name], Mapping) or name in (_FULL, _SLIDING)}
    if not nested:
        return [("", "", rope)]
    if nested != set(rope):
        raise fields.error(key, "one rope, or one for each layer type, and not both")
    used = set(fields.strings("layer_types")) or (nested if window else {_FULL})
    inner = Fields(f"{fields.where}: {key}", rope)
    for name in sorted(used):
        if not inner.object(name):
            raise inner.error(name, "an object with the rope of these layers")
    return [(name, f"{name}.", rope[name]) for name in sorted(used)]


def _read_one(fields: Fields, rope: Fields) -> tuple[float, RopeScaling | None]:
    theta = (rope if "rope_theta" in rope.values else fields).number("rope_theta")
    partial = rope if rope.values.get("partial_rotary_factor") is not None else fields
    if partial.values.get("partial_rotary_factor") is not None:
        partial.one_of("partial_rotary_factor", (1,))
    key = "rope_type" if "rope_type" in rope.values else "type"
    kinds = ("default", "linear", "llama3")
    # Some releases of transformers fail here, others leave the factor out.
    if key not in rope.values and rope.values.get("factor") not in (None, 1):
        raise rope.error("rope_type", f"in {kinds}, since there is a factor")
    kind = rope.one_of(key, kinds)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    return theta, RopeScaling(
        "llama3",
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        _original_context(fields, rope),
    )


def _original_context(fields: Fields, rope: Fields) -> int:
    """Positions before scaling: said beside the rope or in it, else as many as there are."""
    key = "original_max_position_embeddings"
    beside, within = fields.optional_integer(key), rope.optional_integer(key)
    if beside and within and beside != within:
        raise rope.error(key, f"as outside of it, {beside}")
    return beside or within or fields.integer("max_position_embeddings")


def write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` that `read_rope` reads back."""
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
