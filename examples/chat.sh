#!/bin/sh
# One chat turn by curl, with SLOs in headers: 500 ms to the first token, 100 ms for each further one.
# Start a server first: make serve. Usage: examples/chat.sh [QUESTION] [ADDRESS]
set -eu
question=${1:-What is the capital of France?}
address=${2:-localhost:8000}
# JSON strings escape quotes and backslashes.
question=$(printf '%s' "$question" | sed 's/[\\"]/\\&/g')

curl --silent --show-error --fail-with-body "http://$address/v1/chat/completions" \
  --header 'content-type: application/json' \
  --header 'x-slo-ttft-ms: 500' --header 'x-slo-tpot-ms: 100' \
  --data "{\"messages\": [{\"role\": \"user\", \"content\": \"$question\"}],
           \"max_tokens\": 32, \"temperature\": 0, \"timing\": true}"
echo
