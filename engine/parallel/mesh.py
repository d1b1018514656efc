"""Where a rank stands in its gang, and the axes that it shares with others. Layers are given their mesh explicitly."""

from dataclasses import dataclass, field

from engine.config import ParallelConfig
from engine.parallel.collectives import Collectives, LocalCollectives


@dataclass(frozen=True)
class Mesh:
    """Global rank = (pp_rank × dp + dp_rank) × tp + tp_rank: tensor parallel neighbours are adjacent.

    Within a stage, expert index i = dp_rank × tp + tp_rank; ep_rank = i // expert_tp, expert_tp_rank = i % expert_tp.
    """

    config: ParallelConfig = field(default_factory=ParallelConfig)
    rank: int = 0
    tp: Collectives = field(default_factory=LocalCollectives)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.config.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.config.tp % self.config.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.config.tp * self.config.dp)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.config.pp - 1

    def stage_layers(self, num_layers: int) -> range:
        """The layers of this rank's pipeline stage: neighbours, in all stages as equally many as can be."""
        pp, stage = self.config.pp, self.pp_rank
        return range(num_layers * stage // pp, num_layers * (stage + 1) // pp)

    @property
    def expert_index(self) -> int:
        return self.rank % (self.config.tp * self.config.dp)

    @property
    def ep_rank(self) -> int:
        return self.expert_index // self.config.expert_tp

    @property
    def expert_tp_rank(self) -> int:
        return self.expert_index % self.config.expert_tp
