"""Streams a completion with the `openai` package, and says whether it kept its SLO.

  pip install openai
  python examples/openai_client.py --prompt="Once upon a time"

Start a server first: make serve.
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_url", default="http://localhost:8000/v1")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max_tokens", type=int, default=32)
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.base_url, api_key="none")
    stream = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=0,
        stream=True,
        # What OpenAI's API does not have: the request's own SLO, and where its time went.
        extra_body={"slo": {"ttft_ms": 500, "tpot_ms": 100}, "timing": True},
    )
    for event in stream:
        (choice,) = event.choices
        print(choice.text, end="", flush=True)
        if timing := getattr(choice, "timing", None):
            print(f"\nTTFT met: {timing['ttft_met']}, TPOT met: {timing['tpot_met']}")


if __name__ == "__main__":
    main()
