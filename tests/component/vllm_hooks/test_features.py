"""What vLLM's own scheduler and requests say of LoRA, guided decoding and encoders, in a step.

A real scheduler of the installed vLLM schedules real requests, metered as in an engine. There is no
model, and its results are not needed: the features of a step are known when it begins.
"""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_cost_meter.lab.tiny_model import default_path
from vllm_cost_meter.vllm_hooks import canary
from vllm_cost_meter.vllm_hooks.features import FeatureReader
from vllm_cost_meter.vllm_hooks.scheduler import meter_scheduler_class

BLOCK_SIZE, BLOCKS, STEP_TOKENS = 16, 64, 60


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    arguments = EngineArgs(
        model=str(default_path()),
        dtype="float32",
        max_model_len=256,
        max_num_batched_tokens=STEP_TOKENS,
        block_size=BLOCK_SIZE,
        enforce_eager=True,
    )
    init_none_hash(sha256)
    return arguments.create_engine_config()


@pytest.fixture
def scheduler(config: VllmConfig) -> Any:
    config.cache_config.enable_prefix_caching = False
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    made: Any = meter_scheduler_class(Scheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
    )
    # The tiny model has no encoder, so vLLM gives it no room for one.
    made.max_num_encoder_input_tokens = 100
    made.encoder_cache_manager = EncoderCacheManager(cache_size=100)
    return made


def request_of(name: str, prompt_tokens: int = 8, *, guided: bool = False, **more: Any) -> Request:
    grammar = StructuredOutputsParams(regex="a+") if guided else None
    request = Request(
        request_id=name,
        prompt_token_ids=[1] * prompt_tokens,
        sampling_params=SamplingParams(max_tokens=4, structured_outputs=grammar),
        pooling_params=None,
        **more,
    )
    if guided:
        # As if it were compiled: the scheduler lets the request wait until then.
        request.structured_output_request.grammar = object()
    return request


def image_of(tokens: int, name: str) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=name,
        mm_position=PlaceholderRange(offset=2, length=tokens),
        mm_hash=name,
    )


def step_of(scheduler: Any) -> dict[str, tuple[bool, bool, int]]:
    """Schedule a step. Return its requests' features, as the meter has them."""
    output = scheduler.schedule()
    meter = scheduler.cost_meter
    assert meter.guard.errors == 0
    books = meter.books
    newest = books._in_flight[-1][1]
    names = [part[0] for part in books.meter.step_parts(newest)]
    assert sorted(names) == sorted(output.num_scheduled_tokens)
    found = books.meter.step_features(newest)
    return {names[place]: tuple(features) for place, *features in found}


def test_a_step_knows_which_requests_have_lora_are_guided_and_run_an_encoder(scheduler):
    scheduler.add_request(request_of("plain"))
    scheduler.add_request(request_of("lora", lora_request=LoRARequest("adapter", 1, "/adapter")))
    scheduler.add_request(request_of("guided", guided=True))
    scheduler.add_request(request_of("image", 30, mm_features=[image_of(20, "a")]))
    assert step_of(scheduler) == {
        "lora": (True, False, 0),
        "guided": (False, True, 0),
        "image": (False, False, 20),
    }


def test_an_image_that_another_request_had_computed_is_not_computed_again(scheduler):
    scheduler.add_request(request_of("first", 30, mm_features=[image_of(20, "same")]))
    assert step_of(scheduler) == {"first": (False, False, 20)}
    scheduler.add_request(request_of("second", 20, mm_features=[image_of(18, "other")]))
    scheduler.add_request(request_of("third", 24, mm_features=[image_of(20, "same")]))
    assert step_of(scheduler) == {"second": (False, False, 18)}


def test_this_vllm_tells_all_features():
    assert canary.missing_features() == {}


@pytest.mark.parametrize("feature", [canary.LORA, canary.GUIDED, canary.ENCODER])
def test_without_what_tells_a_feature_the_others_are_read_and_one_line_says_so(
    feature, monkeypatch, caplog
):
    class Older:
        def __init__(self, lora_request=None, mm_features=None): ...

        use_structured_output = True

    if feature == canary.GUIDED:
        del Older.use_structured_output
    else:
        gone = canary.FEATURE_PARAMETERS[feature]
        other = {"lora_request": "mm_features", "mm_features": "lora_request"}[gone]
        exec(f"def made(self, {other}=None): ...", scope := {})  # noqa: S102 - a signature without it
        Older.__init__ = scope["made"]
    monkeypatch.setattr("vllm.v1.request.Request", Older)
    assert list(canary.missing_features()) == [feature]
    with caplog.at_level(logging.WARNING):
        reader = FeatureReader()
        request = SimpleNamespace(lora_request=object(), use_structured_output=True)
        assert reader.of_request(request) == (feature != canary.LORA, feature != canary.GUIDED)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"the cost of {feature} is spread over all requests" in line


def test_objects_of_another_shape_cost_one_line_and_no_feature(caplog):
    reader = FeatureReader(missing={})
    request = SimpleNamespace(lora_request=None)  # nothing that tells guided decoding
    with caplog.at_level(logging.WARNING):
        assert [reader.of_request(request) for _ in range(3)] == [(False, False)] * 3
        output = SimpleNamespace(scheduled_encoder_inputs={"a": [0]})
        for _ in range(3):
            assert reader.encoded(output, SimpleNamespace(requests={})) is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "guided decoding" in lines[0]
    assert "encoders" in lines[1]


@pytest.mark.parametrize("length", [-1, 2**31, 10**30, float("nan")])
def test_an_input_of_an_impossible_length_costs_the_feature_and_not_the_step(
    scheduler, length, caplog
):
    scheduler.add_request(request_of("image", 30, mm_features=[image_of(20, "a")]))
    odd = SimpleNamespace(mm_features=[SimpleNamespace(mm_position=SimpleNamespace(length=length))])
    output = SimpleNamespace(scheduled_encoder_inputs={"image": [0]})
    with caplog.at_level(logging.WARNING):
        reader = scheduler.cost_meter_features
        assert reader.encoded(output, SimpleNamespace(requests={"image": odd})) is None
    assert step_of(scheduler) == {}
    (line,) = [r.getMessage() for r in caplog.records if "cost meter" in r.getMessage()]
    assert "the cost of encoders is spread over all requests" in line
