"""One process of a mesh that spans several. The first does what its standard input says, a line
each, and answers in JSON:

  python tests/support/mesh_member.py COORDINATOR COUNT ID CHECKPOINT DEADLINE_S

  requests PATH   serve these requests (JSON); their tokens
  kv PATH         decode what another engine has prefilled (see `save_kv`); its tokens
  steps N         time N decode steps of one row; the median, seconds
"""

import json
import os
import sys
import time
import traceback

import numpy as np

from kairos_jax.engine.devices import Processes, connect, start_jax
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.followers import follow, lead
from kairos_jax.engine.functions import Shapes
from models.checkpoint import open_checkpoint
from models.sampling import SamplingParams
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Seq, Slo

SLO = Slo(30.0, 30.0)
LIMITS = Limits(max_batch=4, max_chunk=32, max_context=128, page_size=8, num_pages=64)


def build(directory, devices, role=Role.BOTH):
    checkpoint = open_checkpoint(directory)
    mesh, rules = make_mesh(devices), Rules()
    params = checkpoint.load(mesh, rules, "float32")
    shapes = Shapes.for_role(role, LIMITS)
    return JaxEngine(checkpoint.config, params, mesh, rules, LIMITS, shapes)


def request(fields):
    fields = dict(fields)
    sampling = SamplingParams(**fields.pop("sampling", {}))
    return Request(arrival=0.0, slo=SLO, sampling=sampling, **fields)


def serve(engine, requests, handed=()):
    """All tokens by id. handed: by id of a request whose first token was made elsewhere, that token
    and the KV of its prompt.
    """
    instance = Instance("only", Role.BOTH, engine.limits)
    handed = dict(handed)
    for each in requests:
        first = [handed[each.id][0]] if each.id in handed else []
        instance.add(each, len(first), 0.0 if first else None, first)
    if handed:
        instance.begin(Batch(fetch=tuple(handed)), 0.0)
    for id, (_, kv) in handed.items():
        seq = instance.fetched(id)
        pages = seq.pages[: engine.limits.pages_for(seq.computed)]
        engine.write_pages(pages, kv)
        written, given = (
            np.concatenate(list(blocks), 1) for blocks in (engine.read_pages(pages), kv)
        )
        tokens = len(pages) * engine.limits.page_size  # the rest is padding
        np.testing.assert_array_equal(written[:, :tokens], given[:, :tokens])
    tokens = {each.id: [handed[each.id][0]] if each.id in handed else [] for each in requests}
    while instance.waiting or instance.running:
        seqs = [*instance.running.values(), *instance.waiting.values()]
        batch = Batch({seq.request.id: min(seq.remaining, 16) for seq in seqs[:2]})
        instance.begin(batch, 0.0)
        work = [(instance.running[id], count) for id, count in batch.work.items()]
        for id, token in engine.step(work).items():
            instance.running[id].tokens.append(token.id)
            tokens[id].append(token.id)
        instance.end(batch, 0.0)
    instance.check()
    return tokens


def save_kv(path, requests, handed):
    """Requests, first tokens and KV as one file without any pickle."""
    blocks = {f"{id}/{n}": block for id, (_, kv) in handed.items() for n, block in enumerate(kv)}
    about = json.dumps([requests, {id: first for id, (first, _) in handed.items()}])
    np.savez(path, about=np.array(about), **blocks)


def load_kv(path):
    with np.load(path) as file:
        requests, firsts = json.loads(str(file["about"]))
        names = sorted(name for name in file.files if "/" in name)
        blocks = {id: [file[name] for name in names if name.split("/")[0] == id] for id in firsts}
    return requests, {id: (first, blocks[id]) for id, first in firsts.items()}


def step_s(engine, count):
    request = Request("0", 0.0, [5] * 40, 1, SLO)
    seq = Seq(request, computed=39)
    seq.pages = list(range(LIMITS.pages_for(40)))
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        engine.step([(seq, 1)])
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def obey(engine, line):
    word, argument = line.split(maxsplit=1)
    if word == "requests":
        with open(argument.strip()) as file:
            return serve(engine, [request(each) for each in json.load(file)])
    if word == "kv":
        requests, handed = load_kv(argument.strip())
        return serve(engine, [request(each) for each in requests], handed)
    return {"step_s": step_s(engine, int(argument))}


def main(address, count, id, directory, deadline_s):
    processes = Processes(address, int(count), int(id))
    connect(processes)
    devices = start_jax(int(count), processes=processes)
    engine = build(directory, devices)
    if not processes.leads:
        follow(engine, processes, float(deadline_s))
        os._exit(0)
    leader = lead(engine, processes, deadline_s=float(deadline_s))
    engine.warm_up()
    compiled = engine.num_compiled
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(engine, line)), flush=True)
    # But for what waits until it is asked for.
    assert engine.num_compiled - engine._functions._score._cache_size() == compiled
    leader.close()
    print(json.dumps("closed"), flush=True)
    os._exit(0)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at a normal exit, JAX waits for the other process
