"""Why a request cannot be served as it is: the errors that its checks raise."""

# Characters of an error that a client is told: an error may quote what the client sent, and a gRPC
# status carries few. It has up to 12 bytes for one that is not ASCII, else up to 3, and clients
# need not take more than 8 KiB.
_MAX_MESSAGE, _MAX_NOT_ASCII = 1000, 500


def message_of(error: Exception) -> str:
    """The error as a client is told it."""
    text = str(error)
    most = _MAX_MESSAGE if text.isascii() else _MAX_NOT_ASCII
    return text if len(text) <= most else text[:most] + "..."


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
