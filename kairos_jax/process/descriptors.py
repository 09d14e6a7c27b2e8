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
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    limit = _MOST if soft == resource.RLIM_INFINITY else soft
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
    limit = _MOST if soft == resource.RLIM_INFINITY else soft
    return max(16, (limit - LEAST) // 2)
