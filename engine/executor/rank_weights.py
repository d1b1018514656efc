"""A rank's model and its weights: loaded once, from ranks that have them and from the checkpoint, then kept through all
formations of its gang."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from engine.config import LoadFormat
from engine.executor.expert_mover import ExpertMover
from engine.executor.memory_check import check_memory
from engine.executor.shard_peers import ShardPeers
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig
from engine.models.registry import Model, build_model
from engine.parallel.lasting_axis import LastingAxis
from engine.parallel.mesh import Mesh
from engine.weights.expert_reader import ExpertReader
from engine.weights.load_check import HostShare
from engine.weights.loader import load_weights
from engine.weights.shared_pieces import PieceKeys, Shard


class RankWeights:
    """Until ``load`` there are none."""

    def __init__(self, model_config: ModelConfig, device: torch.device) -> None:
        self._model_config = model_config
        self._device = device
        self._mesh: Mesh | None = None
        self._model: Model | None = None
        self.experts: ExpertMover | None = None
        """Where experts may move."""
        self.shard: Shard | None = None
        """What other ranks may have of the weights, once they are loaded."""
        self.num_bytes_from_peers = self.num_bytes_from_disk = 0
        """Whence they came."""
        self.is_loading = False

    def load(
        self, config: WorkerConfig, mesh: Mesh, report: Callable[[int, int], None], peers: Mapping[int, str]
    ) -> Model:
        """The model with its weights, which are there from the first call on; from then on only its mesh is another.

        Args:
            report: called with (bytes done, bytes in all).
            peers: where ranks give theirs, in the order in which they are asked; see ShardPeers.
        """
        if self._model is not None and self._mesh is not None:
            for lasting, group in ((self._mesh.tp, mesh.tp), (self._mesh.stage, mesh.stage)):
                assert isinstance(lasting, LastingAxis)
                lasting.form(group)
            return self._model
        self.is_loading = True
        try:
            check_memory(self._model_config, mesh, config.dtype, self._device, config.gpu_memory_utilization)
            self._mesh = replace(mesh, tp=LastingAxis(mesh.tp), stage=LastingAxis(mesh.stage))
            model = build_model(self._model_config, self._mesh, config.dtype, self._device)
            shard = self._fill(model, config, mesh, report, peers)
            if mesh.config.balances_experts:
                reader = ExpertReader(config.model, self._model_config, config.load_format)
                self.experts = ExpertMover(model, mesh, reader, self._device)
        finally:
            self.is_loading = False
        self._model, self.shard = model, shard
        return model

    def _fill(
        self,
        model: Model,
        config: WorkerConfig,
        mesh: Mesh,
        report: Callable[[int, int], None],
        addresses: Mapping[int, str],
    ) -> Shard:
        form = config.load_format
        keys = PieceKeys(config.runs, form, config.dtype, config.quantization, mesh, self._device)
        peers = ShardPeers(config.rank, addresses, config.secret, keys)
        total = load_weights(model, config.model, form, report, _host_share(config), peers.fill)
        self.num_bytes_from_peers = peers.num_bytes
        self.num_bytes_from_disk = 0 if form is LoadFormat.DUMMY else total - peers.num_bytes
        return Shard((*model.slices, *model.conversions), keys)


def _host_share(config: WorkerConfig) -> HostShare:
    if not config.host_ranks:
        return HostShare()
    return HostShare(config.host_ranks.index(config.rank), len(config.host_ranks))
