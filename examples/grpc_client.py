"""Streams a completion over gRPC.

  .venv/bin/python examples/grpc_client.py --prompt="Once upon a time"

Start a server first: make serve. Needs grpcio and the generated `kairos_pb2` modules; clients
without this package generate theirs from kairos_jax/rpc/kairos.proto.
"""

import argparse

import grpc

from kairos_jax.rpc import kairos_pb2, kairos_pb2_grpc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="localhost:50051")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max_tokens", type=int, default=32)
    arguments = parser.parse_args()

    request = kairos_pb2.GenerateRequest(
        text=arguments.prompt,
        max_tokens=arguments.max_tokens,
        slo=kairos_pb2.Slo(ttft_s=0.5, tpot_s=0.1),
        sampling=kairos_pb2.Sampling(temperature=0),
    )
    with grpc.insecure_channel(arguments.address) as channel:
        for response in kairos_pb2_grpc.KairosStub(channel).Generate(request, timeout=60):
            print(response.text_delta, end="", flush=True)
    # The last message has why the output ended, its usage and its times.
    timing = response.timing
    reason = kairos_pb2.FinishReason.Name(response.finish_reason)
    print(f"\n{reason}: TTFT {timing.ttft_s:.3f} s, met: {timing.ttft_met}")


if __name__ == "__main__":
    main()
