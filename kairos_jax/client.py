"""Talks to a server: one prompt, or a whole workload.

kairos client --prompt="What is the capital of France?" --chat
kairos client --prompt_token_ids=1,2,3 --max_tokens=8 --temperature=0 --output=json
kairos client --trace=synthetic --rate=2 --num_requests=50 --max_prompt=256 --max_output=64
kairos client --address=HOST:PORT --tls_ca=ca.pem --prompt=Hello
kairos client --address=HOST:PORT --api_key_file=key --prompt=Hello

Exit codes: 0; 1 for what the server could not do (of a workload: none of it); 2 for what it was
wrong to ask; 130 for Ctrl-C.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
from absl import app, flags
from google.protobuf.json_format import MessageToDict

from kairos_jax.lab.replay import (
    Metadata,
    Received,
    Record,
    error_line,
    fell_behind,
    fit_to_model,
    replay,
)
from kairos_jax.net import credentials
from kairos_jax.net.credentials import Credentials
from kairos_jax.process import descriptors, early, logs
from kairos_jax.process.command import UsageError, read_flags
from kairos_jax.process.files import check_regular
from kairos_jax.process.progress import bars
from kairos_jax.rpc import kairos_pb2, kairos_pb2_grpc
from schedulers.ledger.request import Slo
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.traces import read_trace
from schedulers.simulation.workload import Arrival, rescale, synthetic

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs", "ignore_eos")


_PROMPT_ONLY = (
    *("prompt", "prompt_token_ids", "chat", "request_id", "max_tokens", "stop_token_ids"),
    *("temperature", "top_k", "top_p", "min_p", "logprobs"),
)
_TRACE_ONLY = ("rate", "num_requests", "max_prompt", "max_output")
_WRONG_TO_ASK = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNAUTHENTICATED,
)


def define_flags(values: flags.FlagValues) -> None:
    """Not at import: other binaries have flags of the same names."""
    boolean, enum, integer, listing, number, string = (
        partial(define, flag_values=values)
        for define in (
            flags.DEFINE_boolean,
            flags.DEFINE_enum,
            flags.DEFINE_integer,
            flags.DEFINE_list,
            flags.DEFINE_float,
            flags.DEFINE_string,
        )
    )
    string("address", "127.0.0.1:50051", "host:port of the server.")
    credentials.define_caller_flags(values)
    string("api_key_file", None, "File of the API key that the server asks for.")
    number("timeout", 600.0, "Seconds after which a request is given up.", 0.0)
    enum("output", None, ["json"], "json: one line when done, instead of a stream.")
    # What is not given is not sent, so that the server's own defaults and checks apply.
    string("prompt", None, "Text to continue.")
    listing("prompt_token_ids", None, "Token ids to go on from, instead of text.")
    boolean("chat", False, "Send the prompt as a user's chat message.")
    string("model", None, "Refuse to talk to any other model.")
    string("request_id", None, "Names the request in answers and errors.")
    integer("max_tokens", None, "Tokens to generate at most.")
    number("ttft", None, "SLO: seconds to the first token.")
    number("tpot", None, "SLO: seconds per token after the first.")
    number("temperature", None, "0 is greedy.")
    integer("top_k", None, "Sample among the k likeliest tokens.")
    number("top_p", None, "Sample among the likeliest tokens that reach p.")
    number("min_p", None, "Drop tokens less likely than p times the likeliest.")
    integer("seed", None, "Seed of sampling; with --trace, of the workload.")
    integer("logprobs", None, "Report log-probabilities, with this many alternatives.")
    listing("stop_token_ids", [], "Token ids that end the output.")
    boolean("ignore_eos", None, "Go on past end of sequence. Default with --trace.")
    string("trace", None, "'synthetic', an Azure .csv or a Mooncake .jsonl to replay.")
    number("rate", None, "Requests per second; default: the trace's own, 1 for synthetic.")
    integer("num_requests", 100, "Requests of the workload, at most.", 1)
    integer("max_prompt", None, "Scale the workload's prompts down to this many tokens.", 1)
    integer("max_output", None, "Scale the workload's outputs down to this many tokens.", 1)


def build_request(values: Any) -> kairos_pb2.GenerateRequest:
    """The request that flags ask for.

    Raises:
      UsageError: a flag's value can't be sent. Ranges are left to the server.
    """
    if (values.prompt is None) == (values.prompt_token_ids is None):
        raise UsageError("give either --prompt or --prompt_token_ids, or --trace")
    if values.chat and values.prompt is None:
        raise UsageError("--chat goes with --prompt")
    try:
        request = kairos_pb2.GenerateRequest(
            request_id=values.request_id,
            model=values.model,
            max_tokens=values.max_tokens,
            sampling=kairos_pb2.Sampling(
                **{name: getattr(values, name) for name in _SAMPLING},
                stop_token_ids=[int(id) for id in values.stop_token_ids],
            ),
            slo=kairos_pb2.Slo(ttft_s=values.ttft, tpot_s=values.tpot),
        )
        if values.prompt is None:
            ids = [int(id) for id in values.prompt_token_ids]
            request.token_ids.CopyFrom(kairos_pb2.TokenIds(ids=ids))
        elif values.chat:
            request.chat.messages.add(role="user", content=values.prompt)
        else:
            request.text = values.prompt
    except (ValueError, TypeError) as error:  # Not a number, or past 32 bits.
        raise UsageError(f"a flag has a value that can't be sent: {error}") from error
    return request


async def generate(
    address: str,
    net: Credentials,
    request: kairos_pb2.GenerateRequest,
    timeout_s: float,
    stream: bool,
    metadata: Metadata = (),
) -> dict[str, Any]:
    """Sends one request; with `stream`, prints its text as it comes. metadata: sent with it.

    Returns:
      What --output=json prints. Times are seconds: ttft_s and tpot_s as the client saw them (None
      where there was no such token), timing as the server did.

    Raises:
      grpc.aio.AioRpcError, EOFError: as Received.read.
    """

    def show(delta: str) -> None:
        print(delta, end="", flush=True)

    received = Received()
    async with net.channel(address) as channel:
        stub = kairos_pb2_grpc.KairosStub(channel)
        begin = asyncio.get_running_loop().time()  # time.monotonic(), like the receiver's.
        shown = show if stream else lambda delta: None
        await received.read(stub, request, timeout_s, shown, metadata)
    if stream:
        # A server without a tokenizer sends no text.
        print("" if received.text else " ".join(map(str, received.token_ids)))
    last = received.last or kairos_pb2.GenerateResponse()
    reason = kairos_pb2.FinishReason.Name(last.finish_reason)
    outcome = received.outcome(Slo(1, 1), begin)
    answer = {
        "request_id": last.request_id,
        "text": received.text,
        "token_ids": received.token_ids,
        "finish_reason": reason.removeprefix("FINISH_REASON_").lower(),
        "ttft_s": outcome.ttft_s,
        "tpot_s": outcome.tpot_s,
        "usage": _to_dict(last.usage),
        "timing": _to_dict(last.timing),
    }
    if request.sampling.HasField("logprobs"):
        answer["logprobs"] = [_to_dict(entry) for entry in received.logprobs]
    return answer


async def run_workload(values: Any, net: Credentials, metadata: Metadata = ()) -> None:
    """Replays --trace, then prints the summary. metadata: sent with each call."""
    arrivals = _read_arrivals(values)
    # Matplotlib comes with it: not worth the wait for a single prompt.
    from kairos_jax.lab.report.comparison import Run, print_table

    async with net.channel(values.address) as channel:
        stub = kairos_pb2_grpc.KairosStub(channel)
        asked = kairos_pb2.GetModelRequest()
        model = await stub.GetModel(asked, timeout=values.timeout, metadata=metadata or None)
    if values.model not in (None, model.name):
        raise UsageError(f"--model={values.model} is not served there; {model.name!r} is")
    arrivals = fit_to_model(arrivals, model, values.max_prompt, values.max_output)
    default = model.default_slo
    try:
        slo = Slo(
            default.ttft_s if values.ttft is None else values.ttft,
            default.tpot_s if values.tpot is None else values.tpot,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with bars() as progress:
        records = await replay(
            values.address,
            arrivals,
            slo,
            seed=values.seed or 0,
            ignore_eos=values.ignore_eos is not False,
            timeout_s=values.timeout,
            on_ended=partial(progress, "replay", total=len(arrivals)),
            net=net,
            metadata=metadata,
        )
    label = f"{model.prefill_policy} + {model.decode_policy}"
    run = Run(label, [record.outcome for record in records])
    if values.output == "json":
        print(json.dumps({"policy": label, **run.summary, "errors": _count_errors(records)}))
    else:
        print_table([run])
        for error, count in _count_errors(records).items():
            print(f"{count} failed: {error}")
    _warn_if_behind(run.outcomes)
    if not any(record.outcome.done for record in records):
        raise EOFError("none of the workload was answered")


def _warn_if_behind(outcomes: Sequence[Outcome]) -> None:
    if rates := fell_behind(outcomes):
        sent, answered = rates
        print(
            f"warning: {sent:.2g} requests/s were sent, and {answered:.2g} requests/s answered: "
            "requests pile up, and the longer it goes on, the longer they wait. "
            f"Try --rate={0.9 * answered:.2g}, or shorter ones with --max_prompt and --max_output.",
            file=sys.stderr,
        )


def _read_arrivals(values: Any) -> list[Arrival]:
    count, rate, trace = values.num_requests, values.rate, values.trace
    try:
        if trace == "synthetic":
            return synthetic(count, 1.0 if rate is None else rate, values.seed or 0)
        check_regular(trace)
        arrivals = read_trace(trace)[:count]
        return arrivals if rate is None else rescale(arrivals, rate)
    except OSError as error:
        raise UsageError(f"--trace={trace}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--trace={trace}: {error}") from error


def _count_errors(records: list[Record]) -> dict[str, int]:
    errors = [record.error for record in records if record.error]
    return {error: errors.count(error) for error in dict.fromkeys(errors)}


def _refuse(values: Any, names: Sequence[str], words: str) -> None:
    """A flag that would do nothing is an error."""
    for name in names:
        if values[name].present:
            raise UsageError(words.format(name))


def _to_dict(message: Any) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _key(values: Any) -> Metadata:
    """What shows the API key. Raises UsageError."""
    key = credentials.read_token(values, "api_key_file")
    return (("authorization", f"Bearer {key}"),) if key else ()


async def _run(values: Any) -> None:
    net, metadata = Credentials.caller_from_flags(values), _key(values)
    if values.trace is not None:
        _refuse(values, _PROMPT_ONLY, "--trace makes its own, greedy requests; leave --{} out")
        return await run_workload(values, net, metadata)
    _refuse(values, _TRACE_ONLY, "--{} goes with --trace")
    stream, request = values.output is None, build_request(values)
    answer = await generate(values.address, net, request, values.timeout, stream, metadata)
    if not stream:
        print(json.dumps(answer, ensure_ascii=False))


def run(arguments: Sequence[str], values: flags.FlagValues) -> int:
    """Does what the flags in `values` say; returns the exit code."""
    try:
        if arguments:
            raise UsageError(f"unexpected argument {arguments[0]!r}")
        asyncio.run(_run(values))
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        return _fail(f"INVALID_ARGUMENT: {error}", 2)
    except grpc.aio.AioRpcError as error:
        return _fail(error_line(error, values.address), 2 if error.code() in _WRONG_TO_ASK else 1)
    except EOFError as error:
        return _fail(error_line(error, values.address), 1)
    return 0


def main(argv: list[str]) -> int:
    logs.set_up()
    early.restore()
    try:
        descriptors.ensure()
    except descriptors.TooFew as error:
        return _fail(str(error), 2)
    return run(argv[1:], flags.FLAGS)


def parse_flags(argv: list[str]) -> list[str]:
    """Like absl's own, which exits with 1."""
    try:
        return read_flags(argv)
    except flags.Error as error:
        sys.exit(_fail(f"INVALID_ARGUMENT: {error}", 2))


def _fail(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
