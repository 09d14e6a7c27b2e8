"""Every field that OpenAI's and vLLM's APIs know, and what becomes of it here.

A field is served, or it is refused by name unless it asks for what happens anyway, or it is
harmless and ignored. So nothing that would change an answer is ignored in silence. A field that
neither API knows is ignored; where its name is near a known one, the client is told.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from kairos_jax.api.http.body.fields import Fields, shown
from kairos_jax.api.refusal import BadField

SERVED = frozenset(
    {
        *("model", "n", "best_of", "max_tokens", "max_completion_tokens", "min_tokens"),
        *("temperature", "top_p", "top_k", "min_p", "seed"),
        *("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
        *("logprobs", "skip_special_tokens", "return_token_ids", "timing"),
        *("add_special_tokens", "truncate_prompt_tokens"),
        *("stream", "stream_options", "slo", "request_id"),
    }
)

# Served by one of the two endpoints; by the other, with these values alone.
OF_COMPLETIONS: Mapping[str, tuple[Any, ...]] = {"prompt": (), "echo": (False,)}
OF_CHAT: Mapping[str, tuple[Any, ...]] = {
    "messages": (),
    "top_logprobs": (0,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}

# Not served: what may be asked of it nonetheless. null may always.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # How tokens are chosen.
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "watermarking": (False,),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "vllm_xargs": ({},),
    # What an output looks like.
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    # What a prompt holds.
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "web_search_options": (),
    "prompt_embeds": (),
    "truncation_side": ("left",),
    # What an answer tells.
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    # How it is served.
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
}

# Ignored, whatever the value: the answer is the same. Why it is.
HARMLESS: Mapping[str, str] = {
    "user": "for the operator's records",
    "safety_identifier": "for the operator's records",
    "metadata": "for the operator's records",
    "store": "for the operator's records",
    "session_id": "for the operator's records",
    "service_tier": "there is one",
    "prompt_cache_key": "a hint to routing",
    "prompt_cache_retention": "a hint to the cache",
    "prediction": "a hint, for speed",
    "stream_interval": "how text is cut into events",
    "parallel_tool_calls": "without effect where there are no tools",
    "length_penalty": "of beam search alone",
    "early_stopping": "of beam search alone",
    "guided_decoding_backend": "of guided decoding alone",
    "guided_whitespace_pattern": "of guided decoding alone",
    "spaces_between_special_tokens": "of other tokenizers",
    "media_io_kwargs": "of media alone",
    "mm_processor_kwargs": "of media alone",
    "return_mm_kwargs": "of media alone",
    "return_token_offsets": "of other endpoints",
    "return_token_strs": "of other endpoints",
    "routed_experts_prompt_start": "of models with experts",
}

# The same of one message of a conversation. Harmless: "name", "annotations", "tool_call_id".
NEUTRAL_OF_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "prefix": (False,),
}

STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats", "include_obfuscation"})

_KNOWN = frozenset({*SERVED, *OF_COMPLETIONS, *OF_CHAT, *NEUTRAL, *HARMLESS})
# A client may send any number of fields, of any length.
MOST_LOOKED_AT, _LONGEST = 16, 64
# Of 1, by difflib's measure: "max_new_tokens" is as near as 0.83 to "max_tokens".
_NEAR = 0.8


def refuse_not_served(fields: Fields) -> None:
    """Raises BadField for a field that is not served, unless its value is neutral."""
    for name, values in NEUTRAL.items():
        fields.refuse_all_but(name, *values)


def refuse_of_others(fields: Fields, chat: bool) -> None:
    """Raises BadField for a field that is served for chat where this is not chat, or the other way
    round.
    """
    others, where = (OF_COMPLETIONS, "completions") if chat else (OF_CHAT, "chat")
    here = "chat" if chat else "completions"
    for name, values in others.items():
        value = fields.values.get(name)
        if value is not None and value not in values:
            raise BadField(name, f"is for {where}, and not for {here}; got {shown(value)}")


def near_misses(fields: Fields) -> list[tuple[str, str]]:
    """Fields that are not known, and so are ignored, each with the known one that it is near."""
    found = _near(fields.values, _KNOWN)
    options = fields.values.get("stream_options")
    if isinstance(options, dict):
        near = _near(options, STREAM_OPTIONS)
        found += [(f"stream_options.{name}", f"stream_options.{known}") for name, known in near]
    return found


def _near(names: Iterable[str], known: Iterable[str]) -> list[tuple[str, str]]:
    unknown = [name for name in names if name not in known and len(name) <= _LONGEST]
    found = []
    for name in unknown[:MOST_LOOKED_AT]:
        if match := difflib.get_close_matches(name.lower(), known, 1, _NEAR):
            found.append((name, match[0]))
    return found
