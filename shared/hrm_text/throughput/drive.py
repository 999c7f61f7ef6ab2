"""A process that measures on request: `vllm bench serve` for servers, one after the other without new imports.

    python -m hrm_text.throughput.drive     # in an environment with vLLM

Each line of its input is a JSON list of the arguments of `vllm bench serve`; each line of its output is what that
measured, or {"error": …}. What vLLM prints goes to standard error.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(measure: Callable[[Any], dict[str, Any]]) -> None:
    """Answer each line of the input with a line; a failure is an answer, too."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        try:
            answer = measure(json.loads(line))
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)


def _bench_serve(arguments: list[str]) -> dict[str, Any]:
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args(arguments)
    main(parsed)
    # What `main` returns has lost the errors of failed requests; the file has them.
    result: dict[str, Any] = json.loads(Path(parsed.result_dir, parsed.result_filename).read_text())
    return result


if __name__ == "__main__":
    import vllm.benchmarks.serve  # noqa: F401  (its import takes long, and belongs to no measurement)

    serve(_bench_serve)
