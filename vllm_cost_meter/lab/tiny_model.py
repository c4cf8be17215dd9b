"""Make a tiny random Llama for `make demo` and the tests.

Nothing is downloaded. The tokenizer is a byte-level BPE trained on `TRAINING_TEXT`, with a chat
template, so every generating HTTP route of vLLM works. The weights are random, so the model writes
nonsense, almost always with exactly the requested length: in the output layer the row for the end
of the text is zero and the others are large, so the text ends by itself about once in thousands of
tokens. The same library versions make the same bytes on every machine.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

SEED = 20_240_229
VOCABULARY_LIMIT = 2048
CONTEXT_TOKENS = 8192

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|padding|>"
TURN, TURN_END = "<|turn|>", "<|turn_end|>"

# Standard deviations of the weights. Attention and MLP are initialised as in Llama. The output
# layer is wider, so that sampling at temperature 1 prefers some tokens, as a trained model does.
LAYER_SPREAD = 0.02
OUTPUT_SPREAD = 0.15

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '" + TURN + "' + message['role'] + '\n' }}"
    "{{ (message['content'] or '') + '" + TURN_END + "\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN + "assistant\n' }}{% endif %}"
)

# The recipe is this file: a model made by another version of this file is made again.
RECIPE_FILE = "recipe.sha256"


def default_path() -> Path:
    """Return the path of this installation's tiny model, which may not exist yet.

    It is `.cache/tiny-llama` beside the running virtual environment, so inside the checkout if that
    is `.venv`. Outside any virtual environment it is below the user's cache folder.
    """
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix).resolve().parent / ".cache" / "tiny-llama"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-cost-meter" / "tiny-llama"


def make_tiny_model(path: Path) -> None:
    """Make the model at `path` unless it exists; it appears whole or not at all.

    Raises FileExistsError if something else is at `path`.
    """
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if _is_made_by(recipe, path):
        return
    if path.exists() and not (path / RECIPE_FILE).exists():
        raise FileExistsError(
            f"{path}: expected a tiny model or nothing, got something else: remove it or name"
            " another path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as directory:
        made = Path(directory) / "made"
        _write_model(made)
        (made / RECIPE_FILE).write_text(recipe)
        _move_into_place(made, path, recipe)


def _is_made_by(recipe: str, path: Path) -> bool:
    try:
        return (path / RECIPE_FILE).read_text() == recipe
    except OSError:
        return False


def _move_into_place(made: Path, path: Path, recipe: str) -> None:
    if path.exists():
        # A directory can only be renamed over an empty one.
        path.rename(made.parent / "old")
    try:
        made.rename(path)
    except OSError:
        # Another process was faster, and its model is as good as ours.
        if not _is_made_by(recipe, path):
            raise
        shutil.rmtree(made)


def _write_model(directory: Path) -> None:
    # These imports take seconds and hundreds of megabytes, so they happen only here.
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    tokenizer = _train_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    ends = tokenizer.convert_tokens_to_ids([BEGIN, END, PADDING, TURN, TURN_END])
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)  # the norms
                continue
            is_output = name == "lm_head.weight"
            parameter.normal_(0, OUTPUT_SPREAD if is_output else LAYER_SPREAD, generator=generator)
            if is_output:
                parameter[ends] = 0.0
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _train_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    # These imports are local for the same reason as in `_write_model`.
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    special = [PADDING, BEGIN, END, TURN, TURN_END]
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        [TRAINING_TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=VOCABULARY_LIMIT,
            special_tokens=special,
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=[TURN, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


# The words here become the tokens: with plain English the nonsense reads like words.
TRAINING_TEXT = """\
A server that answers many people at once must share its machine among them. Each step of the
engine takes a little time; some of the requests in that step are long, others are short, and a few
have only just arrived. Who pays for the step? Everyone who was in it, and nobody else. The time
when no request was there is idle time, and idle time has a row of its own, because money was spent
on it as well.

Once upon a time there was a baker who lent her oven to the village. Every morning the neighbours
came with bread, cakes and pies. A small roll was ready in ten minutes, while a large loaf stayed
for an hour. At first she asked the same price of all, and the people with small rolls were not
happy. Then she asked a price by weight, and the people who brought heavy but quick things were not
happy either. At last she put a clock beside the oven and wrote down, for each minute, what was
inside. When the fire burned and the oven was empty she wrote that down too. In the evening the
minutes in her book were exactly the minutes of the day, and since then nobody has argued.

Please write a short story about a river and a mountain. Tell me the name of the largest city in
the world, and explain how a computer stores numbers. What is the weather like today? Could you
help me with this question? Yes, of course: here is the answer. No, I am sorry, that is not
possible. Thank you very much for your help. You are welcome! Let us begin with the first point,
then go on to the second and the third. One, two, three, four, five, six, seven, eight, nine, ten.

The system reads the message of the user and the assistant gives a reply. Summarise the following
text in one sentence. Translate it into another language. Make a list of ideas, in order of cost.
How long does it take, how much does it cost, and where does the time go? Count the tokens of the
prompt and of the output; look at the tokens that were found in the cache; add the numbers up and
compare them with the total. If they differ by a single one, something is wrong and should be said.

Red, green, blue, white and black are colours. Spring, summer, autumn and winter are seasons. Water
is cold, fire is hot, snow falls, birds sing, children play, and old friends meet again in the
garden under the tall trees. They speak about music, books, travel, work, family and good food.
They have been there before, they are there now, and they will be there after us.

def share(step, requests):
    weights = [request.weight for request in requests]
    total = sum(weights)
    return [step * weight // total for weight in weights]

for i in range(0, 100):
    print(i, i * i, i / 2 + 1)
if x == y and not (a < b or c >= d):
    return {"name": "value", "list": [1, 2, 3], "ok": true, "none": null}
"""


if __name__ == "__main__":
    make_tiny_model(default_path())
