"""The tenants file: what is in it, and what is wrong with it."""

from pathlib import Path

import pytest

from cluster.tenants.config import Policies, TenantPolicy, load_policies, parse_policies
from engine.errors import InvalidOption
from engine.request import Tenant

FILE = """
default: {requests_per_minute: 60}
tenants:
  team-a:
    tokens_per_minute: 100000
    max_concurrent_requests: 4
    max_queued_requests: 20
    models: [llama, "llama:lora"]
    weight: 2
    priority: -1
  "team b": {}
"""


def test_each_tenant_has_its_own_and_others_have_the_defaults() -> None:
    policies = parse_policies(FILE, "tenants.yaml")
    assert policies.of("team-a") == TenantPolicy(
        tokens_per_minute=100_000,
        max_concurrent_requests=4,
        max_queued_requests=20,
        models=["llama", "llama:lora"],
        weight=2,
        priority=-1,
    )
    assert policies.of("team b") == TenantPolicy(), "who is named has what is said, not the defaults"
    assert policies.of("stranger") == TenantPolicy(requests_per_minute=60)
    assert policies.engine_tenant("team-a") == Tenant("team-a", 2.0, -1)
    long = [policies.engine_tenant("x" * 200 + end) for end in "ab"]
    assert len({each.name for each in long}) == 2
    for each in long:
        each.validate()
    assert parse_policies('{"tenants": {"x": {"weight": 0.5}}}', "json").of("x").weight == 0.5
    assert parse_policies("", "empty").of("x") == TenantPolicy()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("tenants: {a: {request_per_minute: 1}}", "tenants.a.request_per_minute"),
        ("tenants: {a: {requests_per_minute: 0}}", "tenants.a.requests_per_minute"),
        ("tenants: {a: {tokens_per_minute: '5'}}", "tenants.a.tokens_per_minute"),
        ("tenants: {a: {weight: 1000}}", "tenants.a.weight"),
        ("tenants: {a: {models: llama}}", "tenants.a.models"),
        ("tenants: {a: {models: [1]}}", "tenants.a.models.0"),
        ("default: {priority: 1.5}", "default.priority"),
        ("tenants: {a: {cache_group: ''}}", "tenants.a.cache_group"),
        ("defaults: {}", "defaults"),
        ("- a", "the file"),
        ("tenants: {'': {}}", "tenants."),
        ("tenants: {a: {}, b: {}, a: {}}", "a is there twice"),
        ("tenants: {a: [", "neither YAML nor JSON"),
        ("a: !!python/object/apply:os.system [ls]", "neither YAML nor JSON"),
    ],
)
def test_what_is_wrong_is_named(text: str, key: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_policies(text, "--tenants t.yaml")
    message = str(caught.value)
    assert message.startswith("--tenants t.yaml") and key in message and "\n" not in message


def test_salts_of_different_tenants_and_groups_are_never_equal() -> None:
    groups = {"a": "g", "b": "g", "c": "c", "g": None, "group g": None, "tenant g": None, "x y": "y", "x": "y y"}
    policies = Policies(TenantPolicy(), {name: TenantPolicy(cache_group=group) for name, group in groups.items()})
    given = ["", "s", " s", "g", policies.cache_salt("a", ""), policies.cache_salt("g", "s")]
    found = {(name, salt): policies.cache_salt(name, salt) for name in [*groups, "stranger"] for salt in given}
    assert [found["a", salt] for salt in given] == [found["b", salt] for salt in given]
    assert len(set(found.values())) == len(found) - len(given), "but for the two of one group"
    shared = parse_policies("default: {cache_group: all}\ntenants: {alone: {}}", "t")
    assert shared.cache_salt("x", "") == shared.cache_salt("y", "") != shared.cache_salt("alone", "")


def test_a_changed_file_holds_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(FILE)
    policies = load_policies(path)
    path.write_text("tenants: {team-a: {weight: -1}}")
    assert not policies.poll() and policies.value.of("team-a").weight == 2
    path.write_text("tenants: {team-a: {weight: 3}}")
    assert policies.poll() and policies.value.of("team-a").weight == 3
