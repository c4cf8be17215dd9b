"""A process that has imported vLLM once and forks for each probe: seconds become milliseconds.

Run as a script, it reads one JSON object per line (code, argv, environment, out: a file) and
answers each with the child's exit status. Nothing of the meter is imported before the fork, so that
every child meets the plugin as a fresh interpreter would.
"""

import json
import os
import sys
import traceback


def child(order: dict) -> None:
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.path.extend(order["environment"].get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = order["argv"]
    status = 0
    try:
        exec(compile(order["code"], "probe", "exec"), {"__name__": "__main__"})  # noqa: S102
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    # Its own, because older versions of vLLM log to the standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # What every probe needs; none of it loads plugins when imported.
    import vllm.engine.arg_utils
    import vllm.entrypoints.cli.serve
    import vllm.v1.engine.core
    import vllm.v1.engine.output_processor
    import vllm.v1.metrics.loggers  # noqa: F401

    assert not [name for name in sys.modules if name.startswith("vllm_cost_meter")]
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
