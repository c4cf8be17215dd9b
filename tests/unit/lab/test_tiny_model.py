"""The tiny model: same bytes each time, whole or not there, and a tokenizer that loses nothing."""

import sys
from pathlib import Path

import pytest

from vllm_cost_meter.lab import tiny_model

transformers = pytest.importorskip("transformers", reason="comes with vLLM")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model.make_tiny_model(path)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_making_it_twice_makes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    tiny_model.make_tiny_model(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made)


def test_a_model_that_is_there_is_left_alone(made: Path) -> None:
    before = made.stat().st_mtime_ns, made.stat().st_ino
    tiny_model.make_tiny_model(made)
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == before


def test_a_model_of_another_recipe_is_replaced_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "tiny-llama"
    path.mkdir()
    (path / tiny_model.RECIPE_FILE).write_text("an older one")
    tiny_model.make_tiny_model(path)
    assert (path / "model.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny-llama"]


def test_a_directory_that_is_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="expected a tiny model"):
        tiny_model.make_tiny_model(tmp_path / "letters")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "Dear"
    assert [entry.name for entry in tmp_path.iterdir()] == ["letters"]


def test_any_text_survives_the_tokenizer(made: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    text = "A server in Zürich, 東京 and  two spaces\n\tdone 🎉"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 500 < len(tokenizer) <= tiny_model.VOCABULARY_LIMIT


def test_the_chat_template_marks_each_turn_and_asks_for_the_next(made: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|turn|>system\nBe brief.<|turn_end|>\n"
        "<|turn|>user\nHello<|turn_end|>\n<|turn|>assistant\n"
    )


def test_it_writes_as_long_as_it_is_asked_to(made: Path) -> None:
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        chances = model(torch.tensor([[1, 50, 60, 70]])).logits.softmax(-1)[0, :, :5]
    # The five special tokens: an end in fewer than one of a thousand tokens.
    assert float(chances.sum(-1).max()) < 1e-3


def test_it_lives_beside_the_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/work/checkout/.venv")
    assert tiny_model.default_path() == Path("/work/checkout/.cache/tiny-llama")


def test_without_a_virtual_environment_it_lives_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/someone/cache")
    assert tiny_model.default_path() == Path("/home/someone/cache/vllm-cost-meter/tiny-llama")
