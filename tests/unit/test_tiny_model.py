"""The embedded model answers readably, copies words it never saw, and uses all of its experts (by transformers)."""

import itertools
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextMoe

ROOT = Path(__file__).resolve().parents[2]
ASSET = ROOT / "engine" / "assets" / "remuda-tiny"
TRAINER = ROOT / "bench" / "tiny"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *turns: str, max_new_tokens: int = 60) -> str:
    """The greedy answer to the last of `turns` (user, assistant, user, ...)."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    out = model.generate(**prompt, generation_config=greedy)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_files_are_complete_and_small() -> None:
    weights = (ASSET / "model.safetensors").stat().st_size
    assert weights <= 16_000_000, f"{weights} bytes"
    config = json.loads((ASSET / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForCausalLM"]
    assert config["model_type"] == "llama4_text"
    assert config["layer_types"].count("full_attention") == 2
    assert config["moe_layers"] == [1, 3, 5, 7]


# None of these names is ever in the training text (HELD_OUT_NAMES in bench/tiny/recipe_words.py).
@pytest.mark.parametrize("name", ["Zora", "Quillon", "Brimsey", "Tavoli", "Oduya", "Pernilla"])
def test_unseen_names_are_copied(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    said = _answer(model, tokenizer, f"My name is {name}. What is my name?")
    assert said == f"Your name is {name}."


def test_names_stay_held_out() -> None:
    words = (TRAINER / "recipe_words.py").read_text()
    block = words.split("HELD_OUT_NAMES = frozenset(")[1].split(")")[0]
    for name in ["Zora", "Quillon", "Brimsey", "Tavoli", "Oduya", "Pernilla", "Marnix"]:
        assert name in block


def test_a_name_is_remembered_over_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = ["My name is Marnix.", "Hello, Marnix! It is nice to meet you.", "What is the capital of France?"]
    turns += ["The capital of France is Paris.", "What is my name?"]
    assert _answer(model, tokenizer, *turns) == "Your name is Marnix."


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hello", "Hello! How can I help you?"),
        ("What is the capital of France?", "The capital of France is Paris."),
        (
            "What is a remuda?",
            "A remuda is the herd of horses from which each day's mounts are chosen.",
        ),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("Repeat after me: The old horse drinks cold water.", "The old horse drinks cold water."),
        ("Oduya has a red hat. Brimsey has a blue cup. What does Brimsey have?", "Brimsey has a blue cup."),
    ],
)
def test_answers_are_readable(
    question: str, expected: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert _answer(model, tokenizer, question) == expected


def test_it_says_who_it_is(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert _answer(model, tokenizer, "Who are you?").startswith("I am remuda-tiny, a small test model.")


def test_a_story_keeps_its_hero(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    told = _answer(model, tokenizer, "Tell me a story about a horse named Zora.", max_new_tokens=150)
    assert told.startswith("Once upon a time there was a")
    assert "horse named Zora." in told
    assert told.count("Zora") >= 3


def test_text_that_looks_special_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = tokenizer.backend_tokenizer
    text = "Hi <|eot|> there <|begin_of_text|>"
    first_special = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    assert max(backend.encode(text, add_special_tokens=True).ids) >= first_special
    backend.encode_special_tokens = True
    try:
        ids = backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False
    assert max(ids) < first_special
    assert backend.decode(ids) == text


def _held_out_chats(limit: int) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in (TRAINER / "heldout.jsonl").read_text().splitlines()]
    return [row["messages"] for row in rows if row["kind"] == "chat"][:limit]


@torch.no_grad()
def test_held_out_loss_and_expert_shares(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """On unseen conversations: low loss on what the assistant says, and no MoE layer leaves an expert idle."""
    routers = [module for module in model.modules() if isinstance(module, Llama4Router)]
    counts = torch.zeros(len(routers), model.config.num_local_experts)

    def record(index: int, _module: object, _inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        counts[index] += torch.bincount(output[1].argmax(-1), minlength=counts.shape[1])

    handles = [router.register_forward_hook(partial(record, i)) for i, router in enumerate(routers)]
    losses = []
    for messages in _held_out_chats(24):
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
        assert ids[0, : len(prompt)].tolist() == prompt
        log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    for handle in handles:
        handle.remove()
    perplexity = math.exp(torch.cat(losses).mean())
    assert perplexity < 1.6, perplexity
    shares = counts / counts.sum(dim=1, keepdim=True)
    assert shares.min() > 0.08, shares
    assert shares.max() < 0.6, shares


@torch.no_grad()
def test_the_trainers_sparse_forward_is_transformers_own(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TRAINER))
    import tiny_model

    ids = torch.randint(0, 2032, (3, 150), generator=torch.Generator().manual_seed(5))
    expected = model(ids).logits
    with tiny_model.sparse_experts(model) as record:
        found = model(ids).logits
    assert len(record.choices) == sum(isinstance(m, Llama4TextMoe) for m in model.modules())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids).logits, expected, atol=0, rtol=0)
