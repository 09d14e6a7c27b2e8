r"""Completes a file of prompts without a server, as fast as the machine allows.

  .venv/bin/python examples/offline_batch.py --config=smollm2_135m_cpu_colocated \
    --input=prompts.txt --output=answers.jsonl

The input has one prompt a line; the output one JSON object a line, in the same order. The engine,
the policies and the router are those of the server, on this process's event loop.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

from kairos_jax.config import ServerConfig
from kairos_jax.config.files import read_file
from kairos_jax.engine import profiling
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.model import open_model
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.process.progress import bars
from kairos_jax.routing.router import Router
from kairos_jax.worker.build import build_workers
from models.sampling import SamplingParams
from schedulers.cost import CostModel
from schedulers.ledger.request import Request


async def complete(config, model, engines, cost, prompts: list[str], max_tokens: int) -> list[str]:
    """All prompts at once: the policies form the batches."""
    router = Router(asyncio.get_running_loop(), len(prompts), cost)
    workers = build_workers(config, engines, cost, LocalTransport(), router.emit)
    router.connect(workers)
    for worker in workers:
        worker.start()

    async def one(prompt: str) -> str:
        request = Request(
            "",
            time.monotonic(),
            model.tokenizer.encode(prompt),
            max_tokens,
            config.default_slo,
            stop=model.eos_ids,
            sampling=SamplingParams(temperature=0.0),
        )
        ids = [output.token.id async for output in router.submit(request)]
        return model.tokenizer.decode(ids)

    try:
        return await asyncio.gather(*map(one, prompts))
    finally:
        for worker in workers:
            await asyncio.to_thread(worker.stop, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="smollm2_135m_cpu_colocated")
    parser.add_argument("--model", help="instead of the config's: a path or a hub id")
    parser.add_argument("--profile", type=Path, help="step times; measured if it is left out")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_tokens", type=int, default=32)
    arguments = parser.parse_args()

    prompts = arguments.input.read_text().splitlines()
    values = read_file(arguments.config)
    config = ServerConfig.from_dict(values | {"model": arguments.model or values["model"]})
    devices = start_jax(config.num_devices, 0)
    with arguments.output.open("w") as answers, bars() as progress:
        model = open_model(config)
        engines = build_engines(config, model, devices, progress)
        measured = profiling.load_or_measure(arguments.profile, config, model, engines, progress)
        cost = CostModel.from_profile(measured)
        begun = time.monotonic()
        texts = asyncio.run(complete(config, model, engines, cost, prompts, arguments.max_tokens))
        for prompt, text in zip(prompts, texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}), file=answers)
    print(f"{len(prompts)} prompts in {time.monotonic() - begun:.1f} s: {arguments.output}")


if __name__ == "__main__":
    main()
