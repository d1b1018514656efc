"""What test_roof.py runs on ranks: importable by other processes."""

import torch.distributed as dist


def double_of_all(rank: int, store: dist.Store, value: int) -> list[int]:
    store.set(f"value/{rank}", str(rank * value * 2))
    return [int(store.get(f"value/{other}")) for other in range(2)]


def fails_on_one(rank: int, store: dist.Store) -> None:
    if rank == 1:
        raise ValueError(f"of rank {rank}")
