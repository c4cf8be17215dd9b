"""Another vLLM plugin, installed beside the meter by the tests (through PYTHONPATH).

What it does is said by the environment, so that it reaches every process of a server:

- CMT_SEEN=FILE      appends "pid name" when it is loaded: shows whether other plugins still load
- CMT_ASYNC=1        forces async scheduling, which the CPU platform switches off
- CMT_CHANGED=NAME   gives a callable, "module:Class.method", a signature that nobody knows
- CMT_FAULTS=FILE    makes the hooks named in FILE (one a line) raise, as long as they stand there
- CMT_CLOCK=FILE     adds the seconds that FILE holds to the engine's wall clock
- CMT_PACE=FILE      makes each step of the model take longer by the seconds that FILE holds
- CMT_EXPERTS=1      lets engines on CPUs share the experts of a model: the CPU build lacks two
                     collective operations that it takes
- CMT_NVML=FILE      gives the engine a GPU to read the energy of, which FILE stands for
- CMT_TEE=FOLDER     writes the bytes of every reply as they enter and leave the middleware
"""

import functools
import importlib
import inspect
import os
import sys
import time
from pathlib import Path


def register() -> None:
    if seen := os.environ.get("CMT_SEEN"):
        with Path(seen).open("a") as file:
            file.write(f"{os.getpid()} cost_meter_tests\n")
    if os.environ.get("CMT_ASYNC") == "1":
        force_async_scheduling()
    if os.environ.get("CMT_EXPERTS") == "1":
        share_experts()
    if changed := os.environ.get("CMT_CHANGED"):
        change_signature(changed)
    if "CMT_FAULTS" in os.environ:
        inject_faults(Path(os.environ["CMT_FAULTS"]))
    if "CMT_CLOCK" in os.environ:
        move_clock(Path(os.environ["CMT_CLOCK"]))
    if "CMT_PACE" in os.environ:
        slow_down(Path(os.environ["CMT_PACE"]))
    if "CMT_NVML" in os.environ:
        give_a_gpu(os.environ["CMT_NVML"])
    if "CMT_TEE" in os.environ and "serve" in sys.argv:
        tee_replies(Path(os.environ["CMT_TEE"]))


def force_async_scheduling() -> None:
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def share_experts() -> None:
    """Give the CPU communicator what a mixture of experts across data-parallel engines needs."""
    import torch
    import torch.distributed as dist
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(self, input_, dim=0, sizes=None):
        if isinstance(input_, list):
            return [all_gatherv(self, each, dim, sizes) for each in input_]
        rows = sizes or [input_.shape[0]] * self.world_size
        parts = [input_.new_empty((count, *input_.shape[1:])) for count in rows]
        parts[self.rank_in_group] = input_.contiguous()
        for rank, part in enumerate(parts):
            dist.broadcast(part, src=self.ranks[rank], group=self.cpu_group)
        return torch.cat(parts)

    def reduce_scatterv(self, input_, dim=-1, sizes=None):
        rows = sizes or [input_.shape[0] // self.world_size] * self.world_size
        total = input_.contiguous().clone()
        dist.all_reduce(total, group=self.cpu_group)
        return total.split(rows)[self.rank_in_group].contiguous()

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def change_signature(name: str) -> None:
    """Make a callable of vLLM look as if it took "horizon" first; called as before, it works."""
    module, _, attributes = name.partition(":")
    owner = importlib.import_module(module)
    *classes, attribute = attributes.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, attribute)
    is_static = isinstance(vars(owner).get(attribute), staticmethod)

    @functools.wraps(original)
    def changed(*args, **kwargs):
        return original(*args, **kwargs)

    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    place = 0 if is_static or not classes else 1  # after self
    horizon = inspect.Parameter("horizon", inspect.Parameter.POSITIONAL_ONLY)
    parameters.insert(place, horizon)
    first = [p.replace(kind=inspect.Parameter.POSITIONAL_ONLY) for p in parameters[:place]]
    changed.__signature__ = signature.replace(parameters=[*first, *parameters[place:]])
    setattr(owner, attribute, staticmethod(changed) if is_static else changed)


def inject_faults(file: Path) -> None:
    """Make every hook's body look, each time, whether it is to fail."""
    from vllm_cost_meter.api_server import reply_bytes as reply
    from vllm_cost_meter.engine import meter as engine
    from vllm_cost_meter.vllm_hooks import engine_core, engines, output_processor, scheduler

    fail_where(file, engine.EngineMeter, "snapshot")
    fail_where(
        file,
        scheduler,
        *("_scheduled", "_result_came", "_carry_late_bills", "_added", "_freed"),
    )
    fail_where(file, engine_core, "_slept", "_woke")
    fail_where(file, output_processor, "_born", "_take_bills", "_billed")
    fail_where(file, engines, "poll_engines")
    fail_where(file, reply, "usage_of", "headers", "final_usage", "insert_usage")
    if "serve" in sys.argv:
        # Not in engines: they must not load the ledger.
        from vllm_cost_meter import exchange
        from vllm_cost_meter.api_server import collector, middleware
        from vllm_cost_meter.metrics import owners, series

        fail_where(file, collector, "http_request")
        fail_where(file, exchange.Exchange, "all_billed")
        fail_where(file, owners, "count_bill")
        fail_where(file, series, "count_inter_token_latencies", "set_engine")
        fail_where(file, middleware, "_new_exchange")


def fail_where(file: Path, owner: object, *names: str) -> None:
    """Replace functions of a module or class by ones that raise while the file names them."""
    for name in names:
        original = getattr(owner, name)

        @functools.wraps(original)
        def failing(*args, _original=original, _name=name, **kwargs):
            if _name in file.read_text().split():
                raise RuntimeError(f"injected fault in {_name}")
            return _original(*args, **kwargs)

        setattr(owner, name, failing)


def move_clock(file: Path) -> None:
    from vllm_cost_meter.engine.meter import Clock, EngineMeter

    original = EngineMeter.__init__

    def moved_ns() -> int:
        return time.time_ns() + int(float(file.read_text() or 0) * 1e9)

    @functools.wraps(original)
    def init(self, **options):
        original(self, clock=Clock(unix_ns=moved_ns), **options)

    EngineMeter.__init__ = init


def slow_down(file: Path) -> None:
    """Let a model that takes 2 ms a step run as slowly as a large one, with the cores left free."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    for executor_class in (MultiprocExecutor, UniProcExecutor):
        original = executor_class.execute_model

        def execute_model(self, *args, _original=original, **kwargs):
            time.sleep(float(file.read_text() or 0))
            return _original(self, *args, **kwargs)

        executor_class.execute_model = execute_model


def give_a_gpu(script: str) -> None:
    """Make GPU 0 of the NVML that the tests compiled the engine's own, though it runs on the CPU.

    NVML shows it only from then on: vLLM would take it for a GPU to run on.
    """
    from vllm_cost_meter.vllm_hooks import devices

    def gpu_ordinals(_parallel_config: object) -> tuple[list[int], None]:
        os.environ["FAKE_NVML"] = script
        return [0], None

    devices.gpu_ordinals = gpu_ordinals


def tee_replies(folder: Path) -> None:
    """Write what enters our reply editor, and what leaves it, to one file each per exchange."""
    from vllm_cost_meter.api_server.reply_editor import ReplyEditor

    original_init, original_sending = ReplyEditor.__init__, ReplyEditor.sending

    def append(side, exchange, message) -> None:
        if message["type"] == "http.response.body":
            name = f"{os.getpid()}-{exchange.http_request_id}.{side}"
            with (folder / name).open("ab") as file:
                file.write(message.get("body", b""))

    def init(self, collector, guard, exchange, send, *more) -> None:
        async def leaving(message):
            append("left", exchange, message)
            await send(message)

        original_init(self, collector, guard, exchange, leaving, *more)

    def sending(self):
        send = original_sending(self)

        async def entering(message) -> None:
            append("entered", self._exchange, message)
            await send(message)

        return entering

    ReplyEditor.__init__, ReplyEditor.sending = init, sending
