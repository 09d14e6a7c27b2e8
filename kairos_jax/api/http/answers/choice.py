"""One choice of an answer: tokens in, text out, up to where it ends."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kairos_jax.engine.calls import PromptLogprobs, Token
from kairos_jax.routing.stream import Stream
from kairos_jax.text.detokenizer import Detokenizer
from kairos_jax.text.tokenizer import Tokenizer
from kairos_jax.worker.messages import Output


class StopTexts:
    """Ends a growing text where one of some texts begins in it, or, with `show`, where that one
    ends. What may become one of them is held back until it is known.
    """

    def __init__(self, stops: Sequence[str], show: bool = False):
        self._stops, self._show = stops, show
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes more text; returns what is certain now, and whether the text has ended by it."""
        text = self._held + text
        found = [(at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            at, length = min(found)
            return text[: at + length if self._show else at], True
        certain = min((_begins(text, stop) for stop in self._stops), default=len(text))
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """Returns what was held back, at the end of the output."""
        text, self._held = self._held, ""
        return text


def _begins(text: str, stop: str) -> int:
    """Where at the end of a text another one may have begun."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of some outputs. finish_reason: of the last piece alone."""

    text: str
    tokens: Sequence[Token]
    finish_reason: str | None


@dataclass(slots=True)
class Choice:
    """One stream as one of an answer's choices.

    late_stops: token ids that end it from `min_tokens` on; texts do so from there on too. silent:
    its one token is not shown. shows_end: whether a token id shows where it ends the output; None:
    each does. num_tokens: shown so far. prompt: log-probabilities of its prompt, if they were asked
    for, from the first token on.
    """

    index: int
    stream: Stream
    detokenizer: Detokenizer | None
    stops: StopTexts | None = None
    min_tokens: int = 0
    late_stops: frozenset[int] = frozenset()
    silent: bool = False
    shows_end: Callable[[int], bool] | None = None
    num_tokens: int = 0
    finish_reason: str | None = None
    prompt: PromptLogprobs | None = None

    async def next(self) -> Piece:
        """What is there now, and at least one token. Raises WorkerLost."""
        outputs = await self.stream.take()
        self.prompt = self.prompt or outputs[0].token.prompt
        if self.silent:
            self.finish_reason = "length"
            return Piece("", (), "length")
        if self.stops is None and not self.late_stops:
            return self._whole(outputs)
        return self._until_stop(outputs)

    def _whole(self, outputs: Sequence[Output]) -> Piece:
        tokens = [output.token for output in outputs]
        self.num_tokens += len(tokens)
        self.finish_reason = outputs[-1].finish_reason
        text = self._detokenized(tokens, self.finish_reason == "stop")
        if self.finish_reason and self.detokenizer:
            text += self.detokenizer.flush()
        return Piece(text, tokens, self.finish_reason)

    def _until_stop(self, outputs: Sequence[Output]) -> Piece:
        texts, tokens = [], []
        for output in outputs:
            tokens.append(output.token)
            self.num_tokens += 1
            late = self.num_tokens >= self.min_tokens and output.token.id in self.late_stops
            ends = late or output.finish_reason == "stop"
            text, stopped = self._stopped(self._detokenized([output.token], ends))
            texts.append(text)
            self.finish_reason = "stop" if stopped or late else output.finish_reason
            if self.finish_reason:
                if not stopped:
                    texts.append(self._rest())
                break
        return Piece("".join(texts), tokens, self.finish_reason)

    def _stopped(self, text: str) -> tuple[str, bool]:
        if self.stops is None or self.num_tokens < self.min_tokens:
            return text, False
        return self.stops.push(text)

    def _rest(self) -> str:
        """What was held back, at the end of the output."""
        text = self.detokenizer.flush() if self.detokenizer else ""
        if self.stops is None:
            return text
        certain, stopped = self.stops.push(text)
        if stopped:
            self.finish_reason = "stop"
            return certain
        return certain + self.stops.flush()

    def _detokenized(self, tokens: Iterable[Token], ends: bool) -> str:
        """The text of some tokens. ends: the last of them ends the output."""
        if self.detokenizer is None:
            return ""
        ids = [token.id for token in tokens]
        if ends and self.shows_end and not self.shows_end(ids[-1]):
            del ids[-1]
        return self.detokenizer.push(ids)


class Offsets:
    """Where in a text each of its tokens begins: the first character that it has a part in.

    Args:
      prompt: token ids in front of the text.
      start: the offset of the first token.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], start: int = 0):
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self._next = start

    def push(self, ids: Iterable[int]) -> list[int]:
        """Takes the next tokens; returns the offset of each."""
        offsets = []
        for id in ids:
            offsets.append(self._next)
            if self._detokenizer:
                self._next += len(self._detokenizer.push([id]))
        return offsets


def token_text(tokenizer: Tokenizer | None, id: int) -> str:
    """A token by itself; bytes that are no character show as U+FFFD."""
    return token_bytes(tokenizer, id).decode(errors="replace")


def token_bytes(tokenizer: Tokenizer | None, id: int) -> bytes:
    """The bytes that a token stands for; without a tokenizer, its id in words."""
    return tokenizer.token_bytes(id) if tokenizer else b"token_id:%d" % id
