"""`vllm bench serve` alone. The `vllm` command asks for the metadata of a package of that name
before anything else, and builds for CPUs are published under another.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
