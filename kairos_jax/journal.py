"""Reads the journal of a server or a simulation: why a request waited, what the run was like.

  kairos journal --journal=FILE --explain=REQUEST --profile=profile.json
  kairos journal --journal=FILE --perfetto=run.json
  kairos journal --journal=FILE --profile=profile.json --check

`serve --journal=FILE` and `simulate --journal=FILE` write it. With the profile and the policies of
that run, --explain also says what the policies thought, and --check asks them for every decision
again.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from kairos_jax.engine import profile_file
from kairos_jax.observe.explain import explain
from kairos_jax.observe.perfetto import trace_events
from kairos_jax.process import command
from kairos_jax.process.command import UsageError
from kairos_jax.process.files import check_regular
from kairos_jax.process.outputs import file_to_write
from kairos_jax.process.progress import waiting
from schedulers.cost import CostModel
from schedulers.ledger.instance import Policy
from schedulers.ledger.journal import Record, check, from_lines
from schedulers.policies import decode, prefill
from schedulers.policies.colocated import policies_of


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_string("journal", None, "Journal that a server or a simulation wrote.")
    flags.DEFINE_string("explain", None, "Print why this request waited, by its id.")
    flags.DEFINE_string("perfetto", None, "File for a trace of the run, for ui.perfetto.dev.")
    flags.DEFINE_bool("check", False, "Ask the policies for every decision again.")
    flags.DEFINE_string("profile", None, "Step-time profile with which the run was scheduled.")
    flags.DEFINE_enum(
        "prefill_policy", "kairos_plus", list(prefill.POLICIES), "Prefill policy of the run."
    )
    flags.DEFINE_enum(
        "decode_policy", "kairos_plus", list(decode.POLICIES), "Decode policy of the run."
    )
    flags.DEFINE_float("pack", math.inf, "The run's config.prefill.pack.", 0.0)


def read(path: str | None) -> list[Record]:
    """The records of a journal. Raises UsageError."""
    if path is None:
        raise UsageError("--journal is missing: give a file that serve or simulate wrote")
    try:
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            return list(from_lines(file))
    except OSError as error:
        raise UsageError(f"--journal={path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--journal={path}: {error}") from error


def find_id(records: list[Record], asked: str) -> str:
    """The id in the journal of a request that is asked for by it, or by what a router made it of:
    its name, or NAME#NUMBER where several bore that name. As it was asked, if there is none.
    """
    ids = dict.fromkeys(record[3][0] for record in records if record[1] == "add")
    if asked in ids:
        return asked
    for id in ids:
        inner = id.partition("/")[2]
        if asked in (inner, inner.rpartition("#")[0]):
            return id
    return asked


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    values = flags.FLAGS
    if not (values.explain or values.perfetto or values.check):
        raise UsageError("give --explain, --perfetto or --check")
    if values.check and not values.profile:
        raise UsageError("--check needs the --profile that the run was scheduled by")
    if values.perfetto:
        file_to_write("perfetto", values.perfetto)
    with waiting("read the journal"):
        records = read(values.journal)
    asked: Mapping[str, Policy] = {}
    if values.profile:
        cost = CostModel.from_profile(profile_file.read(values.profile))
        names = values.prefill_policy, values.decode_policy
        asked = policies_of(records, cost, *names, values.pack)
    try:
        if values.explain:
            print(*explain(records, asked, find_id(records, values.explain)), sep="\n")
        if values.perfetto:
            Path(values.perfetto).write_text(json.dumps(trace_events(records)))
    except OSError as error:
        raise UsageError(f"--perfetto={values.perfetto}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    return _check(records, asked) if values.check else 0


def _check(records: list[Record], asked: Mapping[str, Policy]) -> int:
    try:
        print(f"{check(records, asked)} decisions, all the same again")
    except ValueError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    define_flags()
    command.run(main)
