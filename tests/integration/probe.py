"""Loads vLLM's plugins as `vllm serve` would, in a process of its own, and says what changed.

Another plugin, `cost_meter_tests`, is installed beside ours throughout.
"""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.server import PLUGIN_FOLDER

PROBE = """
import json, os, pathlib, sys
from vllm.config import SchedulerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics import loggers
import vllm.plugins
{before}
[command] = serve.cmd_init()
parser = command.subparser_init(FlexibleArgumentParser().add_subparsers())
namespace = parser.parse_args(sys.argv[2:])
hooked = lambda f: hasattr(f, "cost_meter_original")
def is_ours(function):
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is not None and "vllm_hooks" in pathlib.Path(code.co_filename).parts
OWNERS = (AsyncMPClient, EngineArgs, EngineCore, OutputProcessor, Scheduler, SchedulerConfig)
class App:
    added = []
    def add_middleware(self, middleware):
        self.added.append(middleware.__name__)
load_endpoint_plugins = getattr(vllm.plugins, "load_endpoint_plugins", lambda _tasks: [])
endpoint_plugins = load_endpoint_plugins(("generate",))
for plugin in endpoint_plugins:
    plugin.attach_router(App())
print("PROBE" + json.dumps({{
    "scheduler": hooked(SchedulerConfig.get_scheduler_cls),
    "engine": hasattr(EngineCore, "cost_meter_snapshot"),
    "outputs": hooked(OutputProcessor.add_request) or hooked(OutputProcessor.process_outputs),
    "stat_loggers": [f.__name__ for f in loggers.load_stat_logger_plugin_factories()],
    "endpoint_plugins": [plugin.name for plugin in endpoint_plugins],
    "middleware": [name.rpartition(".")[2] for name in App.added + namespace.middleware],
    "ours": [f"{{owner.__name__}}.{{name}}" for owner in OWNERS
             for name, function in vars(owner).items() if is_ours(function)],
    "VLLM_PLUGINS": os.environ.get("VLLM_PLUGINS"),
    "COST_METER_CONFIG": os.environ.get("COST_METER_CONFIG"),
    "plugins_flag": getattr(namespace, "plugins", None),
    "ledger_loaded": "vllm_cost_meter.ledger" in sys.modules,
}}))
"""


@dataclass
class Probe:
    """Loads vLLM's plugins as `vllm serve` would, in a process of its own."""

    zygote: subprocess.Popen[str]
    folder: Path
    status: int = 0
    output: str = ""

    def __call__(self, *arguments: str, before: str = "", **environment: str) -> dict[str, Any]:
        seen = self.folder / "seen"
        seen.unlink(missing_ok=True)
        code = PROBE.format(before=before)
        self.run(code, ["vllm", "serve", *arguments], **environment)
        found = re.search(r"^PROBE(.*)$", self.output, re.MULTILINE)
        return {**(json.loads(found[1]) if found else {}), "other_plugin_loaded": seen.exists()}

    def run(self, code: str, argv: list[str], **environment: str) -> None:
        """Run code in a process of its own, with these arguments; see `status` and `output`."""
        out = self.folder / "out"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_PLUGINS", "COST_"))}
        order = {
            "code": code,
            "argv": argv,
            "environment": {
                **clean,
                "PYTHONPATH": str(PLUGIN_FOLDER),
                "CMT_SEEN": str(self.folder / "seen"),
                "COST_METER_LEDGER": f"sqlite:///{self.folder}/state/ledger.db",
                **environment,
            },
            "out": str(out),
        }
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        self.zygote.stdin.write(json.dumps(order) + "\n")
        self.zygote.stdin.flush()
        self.status = int(self.zygote.stdout.readline())
        self.output = out.read_text()
