"""Where a rank stands in its gang, and the axes that it shares with others. Layers are given their mesh explicitly."""

from dataclasses import dataclass, field

from engine.config import KvGroupConfig, ParallelConfig
from engine.kv_groups import groups_of_stage
from engine.model_config import ModelConfig, kv_groups, stage_layers
from engine.parallel.collectives import Collectives, LocalCollectives
from engine.parallel.stage_link import StageReceiver, StageSender
from engine.progress import RankProgress


@dataclass(frozen=True)
class Mesh:
    """Global rank = (pp_rank × dp + dp_rank) × tp + tp_rank: tensor parallel neighbours are adjacent.

    ``tp``: over the ranks of this one's stage and dp group. ``stage``: over all ranks of its stage, in the order of
    expert_index; where there is one dp group, the same.
    ``previous``, ``next``: to the rank with the same dp and tp rank in the stage before and after this one; None where
    there is no such stage.
    Within a stage, expert index i = dp_rank × tp + tp_rank; ep_rank = i // expert_tp, expert_tp_rank = i % expert_tp.
    """

    config: ParallelConfig = field(default_factory=ParallelConfig)
    rank: int = 0
    tp: Collectives = field(default_factory=LocalCollectives)
    stage: Collectives = field(default_factory=LocalCollectives)
    previous: StageReceiver | None = None
    next: StageSender | None = None
    progress: RankProgress = field(default_factory=RankProgress)
    """Where this rank notes what it does."""

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

    def layers(self, model: ModelConfig) -> range:
        """Those of this rank's pipeline stage."""
        return stage_layers(model, self.config.pp)[self.pp_rank]

    def kv_groups(self, model: ModelConfig, without: frozenset[int] = frozenset()) -> tuple[KvGroupConfig, ...]:
        """The model's KV groups, each with those of its layers that this rank computes. ``without``: see
        engine.model_config.kv_groups."""
        return groups_of_stage(kv_groups(model, self.config.pp, without), self.layers(model))

    @property
    def expert_index(self) -> int:
        return self.rank % (self.config.tp * self.config.dp)

    @property
    def ep_rank(self) -> int:
        return self.expert_index // self.config.expert_tp

    @property
    def expert_tp_rank(self) -> int:
        return self.expert_index % self.config.expert_tp
