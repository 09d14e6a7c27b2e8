"""File descriptors: how many this process may have, and how many of them clients may take."""

import resource

from kairos_jax.process.command import UsageError

# A server opens some fifty for itself; links to peers, probes and files take more.
LEAST = 128
_MOST = 1 << 16


def ensure() -> int:
    """Raises this process's own limit as far as it may, and returns it. Raises UsageError where it
    is too low to serve.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit, wanted = _finite(soft), min(_finite(hard), _MOST)
    if limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        limit = wanted
    if limit < LEAST:
        raise UsageError(
            f"this process may open {limit} files, and a server needs at least {LEAST}: "
            f"ulimit -n {LEAST}"
        )
    return limit


def for_clients() -> int:
    """How many connections of HTTP clients there may be: half of what is left beside a reserve, so
    that links to peers can always be made.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, (_finite(soft) - LEAST) // 2)


def _finite(limit: int) -> int:
    return _MOST if limit == resource.RLIM_INFINITY else limit
