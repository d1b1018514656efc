"""What EndpointSlices and Nodes say, as pure functions."""

import pytest

from cluster.k8s.endpoint_slices import LeaderTable, Pod, ServiceName, endpoints, is_led_by, pods
from cluster.k8s.nodes import leaving_nodes
from engine.errors import InvalidOption
from tests.k8s.objects import endpoint, endpoint_slice, node


def test_an_endpoint_is_its_pod_at_the_port_of_that_name() -> None:
    (found,) = endpoints([endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7"))], "leader").values()
    assert (found.pod, found.address, found.is_ready) == ("llama-0", "10.0.0.7:9052", True)


def test_a_slice_without_the_port_has_none() -> None:
    assert endpoints([endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7"))], "http") == {}


def test_an_ipv6_address_stands_in_brackets() -> None:
    (found,) = endpoints([endpoint_slice("s-1", endpoint("llama-0", "fd00::7"))], "leader").values()
    assert found.address == "[fd00::7]:9052"


def test_a_pod_in_two_slices_is_ready_where_one_says_so() -> None:
    old = endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7", ready=False))
    new = endpoint_slice("s-2", endpoint("llama-0", "10.0.0.7"))
    assert endpoints([old, new], "leader")["llama-0"].is_ready
    assert endpoints([new, old], "leader")["llama-0"].is_ready


def test_an_empty_slice_has_null_for_its_endpoints() -> None:
    """As a Service without pods has it."""
    assert endpoints([{**endpoint_slice("s-1"), "endpoints": None}], "leader") == {}


def test_a_leader_joins_when_it_is_ready_and_stays_until_it_is_gone() -> None:
    table = LeaderTable()

    def look(*entries: dict[str, object]) -> dict[str, str]:
        slices = [endpoint_slice("s-1", *entries)]
        return table.update(endpoints(slices, "leader"), pods(slices))

    assert look(endpoint("llama-0", "10.0.0.7", ready=False)) == {}
    assert look(endpoint("llama-0", "10.0.0.7")) == {"llama-0": "10.0.0.7:9052"}
    assert look(endpoint("llama-0", "10.0.0.7", ready=False)) == {"llama-0": "10.0.0.7:9052"}
    assert look(endpoint("llama-0", "10.0.0.7", ready=False)) == {"llama-0": "10.0.0.7:9052"}
    assert table.ending() == frozenset()
    assert look(endpoint("llama-0", "10.0.0.7", ready=False, terminating=True)) == {"llama-0": "10.0.0.7:9052"}
    assert table.ending() == {"llama-0"}
    assert look() == {}


def test_the_pod_that_comes_back_with_another_address_is_another_leader() -> None:
    table = LeaderTable()
    first = endpoints([endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7"))], "leader")
    again = endpoints([endpoint_slice("s-1", endpoint("llama-0", "10.0.0.8", ready=False))], "leader")
    assert table.update(first, {}) == {"llama-0": "10.0.0.7:9052"}
    assert table.update(again, {}) == {}


def test_a_replica_is_on_the_nodes_of_all_its_pods() -> None:
    leaders = endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7", "gpu-1"), endpoint("llama-1", "10.0.0.8", "gpu-2"))
    workers = endpoint_slice(
        "s-2", endpoint("llama-0-1", "10.0.0.9", "gpu-2"), endpoint("llama-1-1", "10.0.0.6", "gpu-3")
    )
    del workers["ports"][1]
    table = LeaderTable()
    assert set(table.update(endpoints([leaders, workers], "leader"), pods([leaders, workers]))) == {
        "llama-0",
        "llama-1",
    }
    on = {node: table.on_node(node) for node in ("gpu-1", "gpu-2", "gpu-3", "gpu-4")}
    assert on == {"gpu-1": {"llama-0"}, "gpu-2": {"llama-0", "llama-1"}, "gpu-3": {"llama-1"}, "gpu-4": set()}


def test_a_replica_ends_with_any_of_its_pods() -> None:
    leaders = endpoint_slice("s-1", endpoint("llama-0", "10.0.0.7"), endpoint("llama-1", "10.0.0.8"))
    workers = endpoint_slice(
        "s-2",
        endpoint("llama-0-1", "10.0.0.9"),
        endpoint("llama-1-1", "10.0.0.6", ready=False, terminating=True),
    )
    del workers["ports"][1]
    table = LeaderTable()
    known = table.update(endpoints([leaders, workers], "leader"), pods([leaders, workers]))
    assert set(known) == {"llama-0", "llama-1"}
    assert table.ending() == {"llama-1"}


def test_of_two_pods_of_one_name_the_one_that_lives_counts() -> None:
    """As while a pod of a StatefulSet is replaced."""
    old = endpoint_slice("s-1", endpoint("llama-0-1", "10.0.0.9", "gpu-1", ready=False, terminating=True))
    new = endpoint_slice("s-2", endpoint("llama-0-1", "10.0.0.6", "gpu-2", ready=False))
    assert pods([old, new]) == pods([new, old]) == {"llama-0-1": Pod("gpu-2", is_terminating=False)}


LONGEST = "l" * 40
"""A full name as long as the chart allows: KubeRay keeps 50 characters of cluster and group in a worker's name."""


@pytest.mark.parametrize(
    ("pod", "leader", "expected"),
    [
        ("llama-engine-1", "llama-engine-1", True),
        ("llama-engine-1-3", "llama-engine-1", True),
        ("llama-engine-1-3", "llama-engine-2", False),
        ("llama-engine-1", "llama-engine", True),
        ("llama-engine-10", "llama-engine-1", False),
        ("llama-engine-0-workers-worker-abcde", "llama-engine-0-head-fghij", True),
        ("llama-engine-0-workers-worker-abcde", "llama-engine-0-head", True),
        ("llama-engine-0-workers-worker-abcde", "llama-engine-1-head-fghij", False),
        ("llama-engine-0-head-abcde", "llama-engine-1-head-fghij", False),
        (f"{LONGEST}-engine-0--worker-abcde", f"{LONGEST}-engine-0-head", True),
        (f"{LONGEST}-engine-0--worker-abcde", f"{LONGEST}-engine-0-head-fghij", True),
        (f"{LONGEST}-engine-0--worker-abcde", f"{LONGEST}-engine-1-head", False),
        (f"{LONGEST}-engine-10-worker-abcde", f"{LONGEST}-engine-10-head", True),
        (f"{LONGEST}-engine-10-worker-abcde", f"{LONGEST}-engine-1-head", False),
        (f"{LONGEST[:33]}-engine-0-workers-worker-abcde", f"{LONGEST[:33]}-engine-0-head", True),
        (f"{LONGEST[:34]}-engine-0-worker-worker-abcde", f"{LONGEST[:34]}-engine-0-head", True),
        (f"{LONGEST[:35]}-engine-0-worker-worker-abcde", f"{LONGEST[:35]}-engine-0-head", False),
    ],
)
def test_which_pods_are_one_replica(pod: str, leader: str, expected: bool) -> None:
    assert is_led_by(pod, leader) is expected


@pytest.mark.parametrize(
    "text", ["kubernetes:llama", "llm/llama", "kubernetes:/llama", "kubernetes:llm/", "kubernetes:a/b/c"]
)
def test_what_is_no_service_is_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match="kubernetes:NAMESPACE/SERVICE"):
        ServiceName.parse(text)


def test_which_nodes_will_be_emptied() -> None:
    nodes = [
        node("quiet"),
        node("cordoned", unschedulable=True),
        node("gpu", taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]),
        node("spot", taints=[{"key": "cloud.google.com/impending-node-termination", "effect": "NoSchedule"}]),
        node("evicted", taints=[{"key": "example.com/maintenance", "effect": "NoExecute"}]),
        node("silent", taints=[{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]),
    ]
    assert leaving_nodes(nodes) == {
        "cordoned": "cordoned",
        "spot": "about to be terminated",
        "evicted": "tainted example.com/maintenance",
    }
