"""Small tokenizers of both supported forms, trained here, each as a model directory in Hugging Face form."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Naïve café owners ordered 12 crêpes; 日本語の文字列 and 한국어 too. Ünïcödé 🙂🙃 emoji 👩‍👩‍👧!",
    "def f(x):\n    return x * 2  # two\n\n\tindented = True\r\n",
    "Привет, мир! Ελληνικά γράμματα. مرحبا بالعالم",
]

LLAMA3_TEMPLATE = (
    "{%- set date = strftime_now('%d %b %Y') if false else '26 Jul 2024' %}"
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA4_TEMPLATE = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "\n    {%- if message['content'] is string %}\n        {{- message['content'] }}\n    {%- else %}"
    "\n        {%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}\n    {%- endif %}"
    "\n    {{- '<|eot|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}\n{%- endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def byte_level(path: Path, template: str = LLAMA3_TEMPLATE) -> Path:
    """In the manner of Llama 3 and 4: control tokens outside the BPE vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names += ["<|header_start|>", "<|header_end|>", "<|eot|>"]
    names += ["<|python_tag|>", "<|eom_id|>", "<|python_start|>", "<|python_end|>", "[TOOL_CALLS]", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    plain = ["<think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return _write(path, tokenizer, named, template, ["<|eot_id|>", "<|eot|>"])


def sentencepiece(path: Path, template: str = LLAMA2_TEMPLATE) -> Path:
    """In the manner of Llama 2: control tokens and byte tokens in the BPE vocabulary, a space put before the text."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        [line[:60] for line in CORPUS[:1] + CORPUS[2:3]],
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False),
    )
    definition = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in definition["merges"]]
    model = models.BPE(definition["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _write(path, tokenizer, named, template, ["</s>"])


def _write(path: Path, tokenizer: Tokenizer, named: dict[str, str], template: str, ends: list[str]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    files: dict[str, Any] = {
        "config.json": {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size()},
        "generation_config.json": {"eos_token_id": [tokenizer.token_to_id(end) for end in ends]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            **named,
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path
