"""What the workers of a fleet did, from their journals: by instance and by phase of the load."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kairos_jax.observe.explain import explain
from schedulers.ledger.instance import Policy
from schedulers.ledger.journal import Record, differences, from_lines, replay


@dataclass(slots=True)
class Work:
    """What an instance did in a phase: its steps, and the tokens that they computed."""

    prompt_steps: int = 0
    prompt_tokens: int = 0
    answer_steps: int = 0
    answer_tokens: int = 0
    stayed: int = 0
    handed_over: int = 0


def read(folder: Path) -> list[Record]:
    """The journals in a folder as one, in the order of time: processes of a host share a clock."""
    journals = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            journals.append(list(from_lines(file)))
    return list(heapq.merge(*journals, key=lambda record: record[2]))


def account(
    records: Sequence[Record],
    policies: Mapping[str, Policy],
    begun_at: float,
    phase_s: float,
    num_phases: int,
) -> tuple[dict[str, list[Work]], int, int]:
    """What each instance did in each phase; decisions, and those that come out otherwise. What
    happens after the last phase counts in it.
    """
    work = {id: [Work() for _ in range(num_phases)] for id in policies}
    decisions = differing = 0

    def of(id: str, at: float) -> Work:
        phase = int(max(at - begun_at, 0.0) / phase_s)
        return work[id][min(phase, num_phases - 1)]

    for decision in replay(records):
        decisions += 1
        again = decision.again(policies[decision.instance.id])
        differing += bool(differences(decision.batch, again))
        mine, answers, prompts = of(decision.instance.id, decision.now), 0, 0
        for id, count in decision.batch.work.items():
            seq = decision.instance.get(id)
            if seq is not None and seq.num_tokens:
                answers += count
            else:
                prompts += count
        mine.prompt_steps += bool(prompts)
        mine.prompt_tokens += prompts
        mine.answer_steps += bool(answers)
        mine.answer_tokens += answers
    for id, verb, at, *_ in records:
        of(id, at).stayed += verb == "stay"
        of(id, at).handed_over += verb == "hand_over"
    return work, decisions, differing


def timelines(records: Sequence[Record], policies: Mapping[str, Policy]) -> dict[str, list[str]]:
    """Of a request that stayed, and of one that was handed over: those in the middle of the run."""
    told = {}
    for name, verb in (("stayed", "stay"), ("moved", "hand_over")):
        if ids := [record[3] for record in records if record[1] == verb]:
            told[name] = explain(records, policies, ids[len(ids) // 2])
    return told
