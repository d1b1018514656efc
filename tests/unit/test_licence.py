"""What a checkpoint says of its licence: by its texts, its model card, its shapes; and "unknown" for all else."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.licence import UNKNOWN, Licence, licence_of

LLAMA_3: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
SCALED_BY_8 = {"rope_type": "llama3", "factor": 8.0}
SCALED_BY_32 = {"rope_type": "llama3", "factor": 32.0}
LLAMA_3_70B = LLAMA_3 | {"rope_scaling": SCALED_BY_8, "hidden_size": 8192}
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}
CODE_LLAMA_34B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "num_hidden_layers": 48,
    "intermediate_size": 22016,
    "max_position_embeddings": 16384,
    "rope_theta": 1000000,
}
SCOUT: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {"model_type": "llama4_text", "vocab_size": 202048},
    "vision_config": {"hidden_size": 1408},
}
MLLAMA: dict[str, Any] = {
    "architectures": ["MllamaForConditionalGeneration"],
    "model_type": "mllama",
    "text_config": {"model_type": "mllama_text_model", "vocab_size": 128256},
    "vision_config": {"hidden_size": 1280},
}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096}


@pytest.mark.parametrize(
    ("config", "name", "attribution"),
    [
        (LLAMA_3, "Llama 3 Community License", "Built with Meta Llama 3"),
        (LLAMA_3 | {"rope_scaling": None}, "Llama 3 Community License", "Built with Meta Llama 3"),
        (LLAMA_3 | {"rope_scaling": SCALED_BY_8}, "Llama 3.1 Community License", "Built with Llama"),
        (LLAMA_3 | {"rope_parameters": SCALED_BY_8}, "Llama 3.1 Community License", "Built with Llama"),
        (LLAMA_3_70B, "Llama 3.1 or Llama 3.3 Community License", "Built with Llama"),
        (LLAMA_3 | {"rope_scaling": SCALED_BY_32}, "Llama 3.2 Community License", "Built with Llama"),
        (LLAMA_2_7B, "Llama 2 Community License", None),
        (CODE_LLAMA_34B, "Llama 2 Community License", None),
        (SCOUT, "Llama 4 Community License", "Built with Llama"),
        (MLLAMA, "Llama 3.2 Community License", "Built with Llama"),
        (QWEN, "Apache-2.0", None),
        (MIXTRAL, "Apache-2.0", None),
        ({"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 100352}, "MIT", None),
        ({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}, "Gemma Terms of Use", None),
        # Shapes that others use too.
        (LLAMA_2_7B | {"max_position_embeddings": 2048}, UNKNOWN, None),
        (LLAMA_2_7B | {"vocab_size": 64000}, UNKNOWN, None),
        (CODE_LLAMA_34B | {"rope_theta": 10000}, UNKNOWN, None),
        (SCOUT | {"text_config": {"model_type": "llama4_text", "vocab_size": 4096}}, UNKNOWN, None),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000}, UNKNOWN, None),
        ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}, UNKNOWN, None),
        ({}, UNKNOWN, None),
        ({"model_type": 7, "vocab_size": "many", "rope_scaling": [], "text_config": 3}, UNKNOWN, None),
    ],
)
def test_a_config_alone_will_do(tmp_path: Path, config: dict[str, Any], name: str, attribution: str | None) -> None:
    found = licence_of(config)
    assert (found.name, found.attribution) == (name, attribution)
    assert found.source == ("" if name == UNKNOWN else "the shapes in config.json")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert licence_of(path) == licence_of(tmp_path) == found


def test_every_llama_since_the_second_names_the_rule_of_active_users() -> None:
    for config in (LLAMA_2_7B, LLAMA_3, LLAMA_3 | {"rope_scaling": SCALED_BY_8}, SCOUT, MLLAMA):
        assert any("700 million" in notice for notice in licence_of(config).notices)
    assert licence_of(QWEN).notices == ()


def test_only_multimodal_models_name_the_european_clause() -> None:
    for config, is_named in ((SCOUT, True), (MLLAMA, True), (SCOUT | {"vision_config": None}, False), (LLAMA_3, False)):
        assert any("European Union" in notice for notice in licence_of(config).notices) == is_named


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("LICENSE", "LLAMA 2 COMMUNITY LICENSE AGREEMENT\t\nLlama 2 Version Release Date", "Llama 2 Community License"),
        ("LICENSE.txt", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "Llama 3 Community License"),
        ("LICENSE", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version", "Llama 3.1 Community License"),
        ("LICENSE.txt", "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n", "Llama 3.2 Community License"),
        ("LICENSE", "\ufeffLlama 3.3 Community License Agreement\n", "Llama 3.3 Community License"),
        ("LICENSE", "\n\nLLAMA 4 COMMUNITY LICENSE AGREEMENT\n", "Llama 4 Community License"),
        ("LICENSE", "\n      Apache License\n   Version 2.0, January 2004\n", "Apache-2.0"),
        ("LICENSE", "MIT License\n\nCopyright (c)", "MIT"),
        ("LICENSE", "Gemma Terms of Use\n", "Gemma Terms of Use"),
        ("USE_POLICY.md", "**Llama 4** **Acceptable Use Policy**\n", "Llama 4 Community License"),
        ("USE_POLICY.md", "# Llama 2 Acceptable Use Policy\n", "Llama 2 Community License"),
        ("NOTICE", "Llama 3.1 is licensed under the Llama 3.1 Community License, ...", "Llama 3.1 Community License"),
        ("LICENSE", "Research licence of nobody we know\n", UNKNOWN),
        ("LICENSE", "", UNKNOWN),
        # Named further down only: not a title.
        ("LICENSE", "Our own terms\n1\n2\n3\nApache License\nLLAMA 3 COMMUNITY LICENSE\n", UNKNOWN),
    ],
)
def test_a_text_tells_by_its_title(tmp_path: Path, file: str, text: str, name: str) -> None:
    (tmp_path / file).write_text(text)
    found = licence_of(tmp_path)
    assert (found.name, found.source) == (name, file if name != UNKNOWN else "")


@pytest.mark.parametrize(
    ("front_matter", "name"),
    [
        ("license: llama3.1", "Llama 3.1 Community License"),
        ("license: llama2\nlanguage: en", "Llama 2 Community License"),
        ("license: other\nlicense_name: llama4\nlicense_link: LICENSE", "Llama 4 Community License"),
        ("license: Apache-2.0", "Apache-2.0"),
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("license: other\nlicense_name: deepseek", "deepseek"),
        ("license: other", UNKNOWN),
        ("license: unknown", UNKNOWN),
        ("license: [apache-2.0, mit]", UNKNOWN),
        ("license: 3", UNKNOWN),
        ('license: "a\\u001b[31m"', UNKNOWN),
        ("- a\n- list", UNKNOWN),
        ("{ broken: [", UNKNOWN),
        ("language: en", UNKNOWN),
    ],
)
def test_a_model_card_tells(tmp_path: Path, front_matter: str, name: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n# A model\nlicense: mit\n")
    assert licence_of(tmp_path).name == name


def test_the_licence_goes_before_the_card_goes_before_the_policy_goes_before_the_shapes(tmp_path: Path) -> None:
    texts = {
        "config.json": json.dumps(LLAMA_3),
        "USE_POLICY.md": "# Llama 3.2 Acceptable Use Policy",
        "README.md": "---\nlicense: llama3.3\n---\n",
        "LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT",
    }
    names = []
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
        names.append((licence_of(tmp_path).name, licence_of(tmp_path).source))
    assert names == [
        ("Llama 3 Community License", "the shapes in config.json"),
        ("Llama 3.2 Community License", "USE_POLICY.md"),
        ("Llama 3.3 Community License", "README.md"),
        ("Llama 3.1 Community License", "LICENSE"),
    ]


def test_a_card_that_does_not_fit_the_shapes_is_shown_with_a_notice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found = licence_of(tmp_path)
    assert (found.name, found.attribution) == ("Apache-2.0", None)
    assert found.notices == (
        "config.json has the shapes of a model under the Llama 3 Community License, which may apply too",
    )


def test_files_that_cannot_be_read_tell_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "LICENSE").mkdir()
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    assert licence_of(tmp_path) == licence_of(tmp_path / "config.json") == licence_of("/nowhere/at/all") == Licence()


def test_one_line_for_a_terminal() -> None:
    assert Licence().describe() == "licence: unknown"
    assert licence_of(LLAMA_3).describe() == (
        "licence: Llama 3 Community License (by the shapes in config.json); Built with Meta Llama 3"
    )
