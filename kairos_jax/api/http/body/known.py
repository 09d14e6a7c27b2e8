"""Every field that OpenAI's and vLLM's APIs know, those of other servers that change an answer, and
what becomes of each here.

A field is served, or it is refused by name unless it asks for what happens anyway, or it is
harmless and ignored. So nothing that would change an answer is ignored in silence. A field that is
not in these tables is ignored; where its name is near a known one, the client is told.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from kairos_jax.api.http.body.fields import Fields, is_one_of, shown
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

# Not served either: fields that change an answer, of SGLang, Text Generation Inference, llama.cpp,
# Ollama, Cohere, Mistral, Anthropic and transformers.
NEUTRAL_OF_OTHERS: Mapping[str, tuple[Any, ...]] = {
    # How tokens are chosen.
    **dict.fromkeys(("typical_p", "typical", "tfs_z", "repeat_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("mirostat", "mirostat_mode", "dynatemp_range", "xtc_probability"), (0,)),
    **dict.fromkeys(("dry_multiplier", "top_a", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "smoothing_factor"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    "top_n_sigma": (-1,),
    "do_sample": (True,),
    "watermark": (False,),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), ([],)),
    **dict.fromkeys(("force_words_ids", "forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "samplers"), ()),
    **dict.fromkeys(("custom_logit_processor", "custom_params", "negative_prompt"), ()),
    # What an output looks like, and where it ends.
    **dict.fromkeys(("json_schema", "regex", "ebnf", "guided_json_object"), (False,)),
    **dict.fromkeys(("grammar", "format"), ("",)),
    **dict.fromkeys(("stop_regex", "reasoning_format", "max_length", "max_time"), ()),
    **dict.fromkeys(("no_stop_trim", "return_full_text"), (False,)),
    **dict.fromkeys(("min_length", "n_indent"), (0,)),
    # Which model, and what its prompt holds.
    **dict.fromkeys(("lora", "images", "image_data", "connectors", "transforms"), ([],)),
    **dict.fromkeys(("lora_path", "adapter_id", "input_embeds", "context", "template"), ()),
    **dict.fromkeys(("options", "parameters"), ({},)),
    **dict.fromkeys(("raw", "raw_prompting", "safe_prompt"), (False,)),
    **dict.fromkeys(("think", "thinking", "reasoning", "prompt_mode", "safety_mode"), ()),
    # What an answer tells.
    **dict.fromkeys(("return_hidden_states", "decoder_input_details"), (False,)),
}

# Other servers' names for what is served here, and the name that it has here.
NAMES_OF_OTHERS: Mapping[str, str] = {
    **dict.fromkeys(("n_predict", "num_predict", "max_output_tokens"), "max_tokens"),
    **dict.fromkeys(("max_new_tokens", "max_tokens_to_sample"), "max_tokens"),
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "random_seed": "seed",
    "num_return_sequences": "n",
    "p": "top_p",
    "k": "top_k",
    **dict.fromkeys(("n_probs", "top_n_tokens"), "logprobs"),
    **dict.fromkeys(("truncate", "max_input_tokens"), "truncate_prompt_tokens"),
    **dict.fromkeys(("enable_thinking", "thinking_budget"), "chat_template_kwargs"),
    **dict.fromkeys(("input_ids", "inputs", "input"), "prompt"),
    **dict.fromkeys(("system", "preamble", "instructions", "message"), "messages"),
    "chat_history": "messages",
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

# The same of one message of a conversation. Harmless: "annotations", "tool_call_id".
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

_OTHERS = frozenset({*NEUTRAL_OF_OTHERS, *NAMES_OF_OTHERS})
_KNOWN = frozenset({*SERVED, *OF_COMPLETIONS, *OF_CHAT, *NEUTRAL, *HARMLESS})
# A client may send any number of fields, of any length.
MOST_LOOKED_AT, _LONGEST = 16, 64
# Of 1, by difflib's measure: "max_tokens_new" is as near as 0.83 to "max_tokens".
_NEAR = 0.8


def refuse_not_served(fields: Fields) -> None:
    """Raises BadField for a field that is not served, unless its value is neutral."""
    for name, values in NEUTRAL.items():
        fields.refuse_all_but(name, *values)
    for name, values in NEUTRAL_OF_OTHERS.items():
        fields.refuse_all_but(name, *values)
    for name, ours in NAMES_OF_OTHERS.items():
        if fields.values.get(name) is not None:
            raise BadField(name, f"is not known here: {ours} is")


def refuse_of_others(fields: Fields, chat: bool) -> None:
    """Raises BadField for a field that is served for chat where this is not chat, or the other way
    round.
    """
    others, where = (OF_COMPLETIONS, "completions") if chat else (OF_CHAT, "chat")
    here = "chat" if chat else "completions"
    for name, values in others.items():
        value = fields.values.get(name)
        if value is not None and not is_one_of(value, values):
            raise BadField(name, f"is for {where}, and not for {here}; got {shown(value)}")


def near_misses(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Fields that are not known, and so are ignored, each with the known one that it is near."""
    found = _near(body, _KNOWN)
    options = body.get("stream_options")
    if isinstance(options, dict):
        near = _near(options, STREAM_OPTIONS)
        found += [(f"stream_options.{name}", f"stream_options.{known}") for name, known in near]
    return found


def _near(names: Iterable[str], known: Iterable[str]) -> list[tuple[str, str]]:
    unknown = [
        name
        for name in names
        if name not in known and name not in _OTHERS and len(name) <= _LONGEST
    ]
    found = []
    for name in unknown[:MOST_LOOKED_AT]:
        if match := difflib.get_close_matches(name.lower(), known, 1, _NEAR):
            found.append((name, match[0]))
    return found
