"""Why a request cannot be served as it is: the errors that its checks raise."""

# Characters of an error that a client is told: a gRPC status carries few, and an error may quote
# what the client sent.
_MAX_MESSAGE = 1000


def message_of(error: Exception) -> str:
    """The error as a client is told it."""
    text = str(error)
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."


class BadField(ValueError):
    """A field of a request that cannot be served.

    field: its name. problem: what is wrong with it, with the value and the limit.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field} {problem}")
        self.field, self.problem = field, problem


class TooLong(BadField):
    """The prompt, or the prompt and its output, do not fit the model's context."""


class UnknownModel(ValueError):
    """The request asks for a model that is not served here."""
