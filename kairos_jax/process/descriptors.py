"""File descriptors: how many this process may have, and how many of them clients may take."""

import resource

# A server opens some fifty for itself; links to peers, probes and files take more. What is no
# server needs less, which is not worth another number.
LEAST = 128
_MOST = 1 << 16


class TooFew(Exception):
    """This process may open too few files; the message says how many."""


def ensure() -> int:
    """Raises this process's own limit as far as it may, and returns it. Raises TooFew."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit, wanted = _finite(soft), min(_finite(hard), _MOST)
    if limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        limit = wanted
    if limit < LEAST:
        raise TooFew(
            f"this process may open {limit} files, and needs at least {LEAST}: ulimit -n {LEAST}"
        )
    return limit


def for_clients() -> int:
    """How many connections of clients there may be, of HTTP and of gRPC alike: a third each of what
    is left beside a reserve, so that links to peers can always be made.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, (_finite(soft) - LEAST) // 3)


def _finite(limit: int) -> int:
    return _MOST if limit == resource.RLIM_INFINITY else limit
