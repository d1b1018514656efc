"""What is measured, as it travels from the hosts (MessagePack). Says nothing of good or bad."""

import msgspec

from cluster.replica.fabric import Hca, Nic


class Gpu(msgspec.Struct, frozen=True):
    """As the driver lists it, whatever a process may see. ``numa_node`` None: the host does not tell."""

    name: str
    total_bytes: int
    free_bytes: int
    pci_address: str = ""
    numa_node: int | None = None


DOWNLOADS = "downloads"
"""The use of the disk that a hub's models are downloaded to."""


class Disk(msgspec.Struct, frozen=True):
    """The file system under ``path``, which is there for ``use``. ``error``: why nothing could be asked of it."""

    use: str
    path: str
    free_bytes: int
    total_bytes: int
    error: str | None = None


class Checkpoint(msgspec.Struct, frozen=True):
    """``digest``: of the names and sizes of its files, and of the manifest of their hashes where it has one. ``error``:
    why this host does not have it. ``bytes_to_download``: of a hub's model that is not there yet, or only in part; None
    where nothing is missing."""

    digest: str = ""
    num_bytes: int = 0
    error: str | None = None
    bytes_to_download: int | None = None


class HostFacts(msgspec.Struct, frozen=True):
    """One host's. ``settings``: variables of the environment that Ray on this host was started with.
    ``bytes_read_per_s``: of the checkpoint, past the page cache; None where it was not measured, and where it cannot be
    read, as ``read_error`` then says."""

    address: str
    name: str
    versions: dict[str, str]
    code_digest: str
    settings: dict[str, str]
    available_bytes: int
    gpus: tuple[Gpu, ...]
    shm_free_bytes: int
    limits: dict[str, int]
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    hcas: tuple[Hca, ...]
    num_numa_nodes: int
    checkpoint: Checkpoint | None = None
    bytes_read_per_s: float | None = None
    read_error: str | None = None


class HostQuestion(msgspec.Struct, frozen=True):
    """What a host is asked. ``model`` None: no checkpoint is looked at; ``reads_disk``: read from it, too.
    ``checkpoint_bytes``: of a hub's model, as whoever asks has it."""

    address: str
    model: str | None = None
    revision: str | None = None
    reads_disk: bool = False
    checkpoint_bytes: int = 0


class Clock(msgspec.Struct, frozen=True):
    """A host's clock against ours: ahead by ``offset_s``, give or take ``uncertainty_s``."""

    offset_s: float
    uncertainty_s: float


class LinkFacts(msgspec.Struct, frozen=True):
    """Between two ranks, ``first`` < ``second``, as ``first`` saw it. None: not reached.

    Attributes:
        transport: what carries collectives between them: shared memory, gloo or nccl.
        collective_s: median time of an all-reduce of 8 KiB.
        collective_bytes_per_s: of a large all-reduce, bytes of the tensor.
        channel_s: median round trip of 1 KiB over TCP, as the step channel has it; None inside a host.
        channel_bytes_per_s: of one TCP connection, the slower of both directions; None inside a host.
        lost_share: of the TCP segments sent without haste, so many had to be sent again.
        error: what went wrong instead.
    """

    first: int
    second: int
    transport: str = ""
    collective_s: float | None = None
    collective_bytes_per_s: float | None = None
    channel_s: float | None = None
    channel_bytes_per_s: float | None = None
    lost_share: float | None = None
    error: str | None = None


class RankFacts(msgspec.Struct, frozen=True):
    """``bytes_per_s``: at which the rank's device reads memory."""

    rank: int
    device: str
    visible_devices: str
    bytes_per_s: float
    links: tuple[LinkFacts, ...]


class RankQuestion(msgspec.Struct, frozen=True):
    """``rounds``: pairs of ranks that measure at the same time, round after round; ``store``: where all meet.
    ``tcp_only``: neither the device nor collectives are measured."""

    rank: int
    hosts: tuple[str, ...]
    on_gpu: bool
    store_host: str
    store_port: int
    rounds: tuple[tuple[tuple[int, int], ...], ...]
    tcp_only: bool = False
