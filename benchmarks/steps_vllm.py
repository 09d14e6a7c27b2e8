"""vLLM's side of benchmarks/vs_vllm.py: its offline engine, asked by JSON lines.

Run by vLLM's own Python, so it imports nothing of this project. A line on stdin has "prompts"
(lists of token ids) and "full_steps": all prompts are given to the engine at once, and are ended
when so many steps have given a token to each of them. The answer has "at", seconds from then to the
end of each step that gave tokens; "counts", how many it gave; and "first", the first token of each
prompt.
"""

import json
import os
import sys
import time


def main(model: str, max_context: str) -> None:
    """Starts the engine, says so, and answers until stdin ends."""
    # What vLLM prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            dtype="float32",
            max_model_len=int(max_context),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    )
    print(json.dumps({"vllm": vllm.__version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(run(engine, int(max_context), **json.loads(line))), file=answers)


def run(engine, max_context: int, prompts: list[list[int]], full_steps: int) -> dict:
    """Steps the engine as its own offline interface does."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    first: dict[str, int] = {}
    at, counts, full = [], [], 0
    begin = time.perf_counter()
    for index, prompt in enumerate(prompts):
        how = SamplingParams(
            temperature=0.0,
            max_tokens=max_context - len(prompt),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(str(index), {"prompt_token_ids": prompt}, how)
    while full < full_steps:
        outputs = engine.step()
        now = time.perf_counter() - begin
        tokens = {output.request_id: output.outputs[0].token_ids for output in outputs}
        for id, ids in tokens.items():
            if ids:
                first.setdefault(id, ids[0])
        if count := sum(map(len, tokens.values())):
            at.append(now)
            counts.append(count)
            full += count == len(prompts)
    engine.abort_request([str(index) for index in range(len(prompts))])
    while engine.has_unfinished_requests():
        engine.step()
    return {"at": at, "counts": counts, "first": [first[str(i)] for i in range(len(prompts))]}


if __name__ == "__main__":
    main(*sys.argv[1:])
