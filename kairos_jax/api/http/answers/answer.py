"""Answers in the form of OpenAI's API: whole, or as server-sent events.

Events are put together from templates, of which only the text of each is serialised: 20,000 of them
a second are to leave most of a core to others.
"""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kairos_jax.api.http.answers.choice import Choice, Offsets, Piece, token_bytes, token_text
from kairos_jax.api.http.body.request import Ask
from kairos_jax.api.http.to_json import to_bytes, to_json
from kairos_jax.engine.calls import Token
from kairos_jax.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
# JSON has no infinity.
_LEAST_LOGPROB = -9999.0


class Answer:
    """The choices of one request, and how they are written. is_large: to make a part of it may take
    longer than tokens of others should wait.
    """

    def __init__(
        self, ask: Ask, model: str, choices: Sequence[Choice], tokenizer: Tokenizer | None
    ):
        self.ask, self.choices, self._tokenizer = ask, choices, tokenizer
        self.is_large = ask.logprobs is not None and (ask.echo or not ask.stream)
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(12)
        self._offsets: dict[int, Offsets] = {}  # of the output of each choice, by its index
        kind = ("chat.completion" if ask.chat else "text_completion") + (
            ".chunk" if ask.chat and ask.stream else ""
        )
        head = {"id": self.id, "object": kind, "created": int(time.time()), "model": model}
        self._head = head
        # Every event of a choice begins so, up to its text, and most end so.
        opened = to_json(head)[:-1] + ',"choices":[{"index":'
        delta = ',"delta":{"content":' if ask.chat else ',"text":'
        self._begins = [f"data: {opened}{choice.index}{delta}" for choice in choices]
        self._brace = "}" if ask.chat else ""
        usage = ',"usage":null' if ask.include_usage else ""
        self._rest = f'{self._brace},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
        self._plain = not (
            ask.continuous_usage or ask.return_token_ids or ask.logprobs is not None or ask.timing
        )

    # As events.

    def first(self, choice: Choice) -> bytes:
        """What goes before the first event of a choice: its role, or the prompt that is echoed."""
        if self.ask.chat:
            delta = {"role": "assistant", "content": ""}
            return self._event({"index": choice.index, "delta": delta})
        if self.ask.echo:
            shown = {"index": choice.index, "text": self._prompt(choice)}
            return self._event(shown | {"logprobs": self._logprobs(choice, (), with_prompt=True)})
        return b""

    def event(self, choice: Choice, piece: Piece) -> bytes:
        """What came of a choice."""
        if self._plain and piece.finish_reason is None:
            return (self._begins[choice.index] + to_json(piece.text) + self._rest).encode()
        shown: dict[str, Any] = {"index": choice.index}
        shown |= {"delta": {"content": piece.text}} if self.ask.chat else {"text": piece.text}
        shown["logprobs"] = self._logprobs(choice, piece.tokens)
        shown["finish_reason"] = piece.finish_reason
        if self.ask.return_token_ids:
            shown["token_ids"] = [token.id for token in piece.tokens]
        if piece.finish_reason and self.ask.timing:
            shown["timing"] = _timing(choice)
        return self._event(shown)

    def usage_event(self) -> bytes:
        """The last event before DONE, if the request asks for it."""
        return event_of(self._head | {"choices": [], "usage": self._usage()})

    def _event(self, shown: dict[str, Any]) -> bytes:
        shown = {"logprobs": None, "finish_reason": None} | shown
        event: dict[str, Any] = self._head | {"choices": [shown]}
        if self.ask.continuous_usage:
            event["usage"] = self._usage()
        elif self.ask.include_usage:
            event["usage"] = None
        return event_of(event)

    # Whole.

    def opening(self) -> bytes:
        """What goes before the choices."""
        return (to_json(self._head)[:-1] + ', "choices": [').encode()

    def closing(self) -> bytes:
        """What goes after them."""
        return ('], "usage": ' + to_json(self._usage()) + "}").encode()

    def whole(self, choice: Choice, pieces: Sequence[Piece]) -> bytes:
        """A choice of which all is there."""
        return to_bytes(self._whole(choice, pieces))

    def _whole(self, choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        shown: dict[str, Any] = {"index": choice.index}
        if self.ask.chat:
            shown["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            shown["text"] = self._prompt(choice) + text if self.ask.echo else text
        shown["logprobs"] = self._logprobs(choice, tokens, with_prompt=True)
        shown["finish_reason"] = choice.finish_reason
        if self.ask.return_token_ids:
            shown["token_ids"] = [token.id for token in tokens]
        if self.ask.timing:
            shown["timing"] = _timing(choice)
        return shown

    # Their parts.

    def _prompt(self, choice: Choice) -> str:
        number = choice.index // self.ask.n
        if (text := self.ask.prompts[number]) is not None:
            return text
        prompt = self.ask.requests[number].prompt
        return self._tokenizer.decode(prompt) if self._tokenizer else ""

    def _echoed(self, choice: Choice) -> list[Token]:
        """The tokens of a prompt whose log-probabilities are shown, of which the first has none."""
        if choice.prompt is None:
            return []
        prompt = self.ask.requests[choice.index // self.ask.n].prompt
        return [Token(prompt[0]), *choice.prompt.tokens(prompt)]

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(request.prompt) for request in self.ask.requests)
        completion = sum(choice.num_tokens for choice in self.choices)
        # A prompt counts once: for the choice that found the least of it, as the others found what
        # that one had computed.
        cached = [choice.stream.cached_tokens for choice in self.choices]
        firsts = range(0, len(cached), self.ask.n)
        found = sum(min(cached[first : first + self.ask.n]) for first in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": found},
        }

    def _logprobs(
        self, choice: Choice, tokens: Sequence[Token], with_prompt: bool = False
    ) -> dict[str, Any] | None:
        """The log-probabilities of some of the output, after those of an echoed prompt."""
        if self.ask.logprobs is None:
            return None
        if self.ask.chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        echoed = self._echoed(choice) if with_prompt else []
        offsets = Offsets(self._tokenizer, ()).push(token.id for token in echoed)
        offsets += self._output_offsets(choice).push(token.id for token in tokens)
        shown = [*echoed, *tokens]
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(token.logprob) for token in shown],
            "tokens": [self._text(token.id) for token in shown],
            "top_logprobs": [self._top(token) for token in shown],
        }

    def _output_offsets(self, choice: Choice) -> Offsets:
        if choice.index not in self._offsets:
            start = len(self._prompt(choice)) if self.ask.echo else 0
            prompt = choice.stream.request.prompt
            self._offsets[choice.index] = Offsets(self._tokenizer, prompt, start)
        return self._offsets[choice.index]

    def _top(self, token: Token) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        top: dict[str, float | None] = {}
        for id, value in token.top:
            text = self._text(id)
            # Of several that look alike, the likeliest has the text as its name.
            top[text if text not in top else f"token_id:{id}"] = _finite(value)
        return top

    def _chat_logprob(self, token: Token) -> dict[str, Any]:
        def shown(id: int, value: float | None) -> dict[str, Any]:
            spelled = list(token_bytes(self._tokenizer, id))
            return {"token": self._text(id), "logprob": _finite(value), "bytes": spelled}

        top = [shown(*each) for each in token.top]
        return shown(token.id, token.logprob) | {"top_logprobs": top}

    def _text(self, id: int) -> str:
        return token_text(self._tokenizer, id)


def event_of(value: Mapping[str, Any]) -> bytes:
    """A server-sent event of a JSON object."""
    return b"data: " + to_bytes(value) + b"\n\n"


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else max(value, _LEAST_LOGPROB)


def _timing(choice: Choice) -> dict[str, Any]:
    """Where its time went, in seconds; what is not a number is left out."""
    timing = asdict(choice.stream.timing())
    return {name: value for name, value in timing.items() if abs(value or 0) < float("inf")}
