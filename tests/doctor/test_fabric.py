"""What is read from the kernel's files, and which network collectives are told to use."""

from pathlib import Path

from cluster.doctor.check_network import chosen_environment
from cluster.replica.fabric import Hca, network_interfaces, num_numa_nodes, numa_node, rdma_ports
from tests.doctor.sample_facts import adapters, healthy


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_rdma_ports_as_the_kernel_lists_them(tmp_path: Path) -> None:
    port = "class/infiniband/mlx5_0/ports/1"
    plant(
        tmp_path,
        {
            f"{port}/state": "4: ACTIVE\n",
            f"{port}/rate": "400 Gb/sec (4X NDR)\n",
            f"{port}/link_layer": "InfiniBand\n",
            "class/infiniband/mlx5_0/device/numa_node": "1\n",
            "class/infiniband/mlx5_0/device/net/ib0/mtu": "4092\n",
            "class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
        },
    )
    up, down = rdma_ports(tmp_path)
    assert up == Hca("mlx5_0", 1, True, 400.0, "InfiniBand", "ib0", 1)
    assert (down.name, down.is_active) == ("mlx5_1", False)
    assert rdma_ports(tmp_path / "none") == ()


def test_numa_nodes(tmp_path: Path) -> None:
    plant(tmp_path, {"a/numa_node": "-1\n", "b/numa_node": "1\n"})
    plant(tmp_path, {f"devices/system/node/node{n}/cpulist": "" for n in range(2)})
    assert numa_node(tmp_path / "a") is None
    assert numa_node(tmp_path / "b") == 1
    assert numa_node(tmp_path / "c") is None
    assert num_numa_nodes(tmp_path) == 2


def test_this_hosts_loopback_is_among_its_interfaces() -> None:
    (loopback,) = [nic for nic in network_interfaces() if "127.0.0.1" in nic.addresses]
    assert not loopback.is_physical


def test_the_fastest_active_ports_and_the_interface_of_the_address_are_chosen() -> None:
    assert chosen_environment(healthy(hcas=adapters())) == {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
    }
    assert "NCCL_IB_HCA" not in chosen_environment(healthy())
    assert "NCCL_IB_HCA" not in chosen_environment(healthy(hcas=adapters(), settings={"NCCL_IB_DISABLE": "1"}))


def test_what_the_user_has_set_stays() -> None:
    given = {"NCCL_SOCKET_IFNAME": "ib", "NCCL_IB_HCA": "mlx5_9"}
    chosen = chosen_environment(healthy(hcas=adapters(), settings=given))
    assert (chosen["NCCL_SOCKET_IFNAME"], chosen["NCCL_IB_HCA"]) == ("ib", "mlx5_9")
