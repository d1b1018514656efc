"""A leader of the simulation: the real server, engine loop, engine and scheduler over a gang without a model."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cluster.replica.engine_loop import EngineLoop, StepOutputs
from cluster.replica.server import LeaderServer
from cluster.replica.servicer import ReplicaServicer
from cluster.simulate.calls import serve_call
from cluster.simulate.gang import SimulatedGang
from cluster.simulate.process import Process
from cluster.simulate.vocabulary import VOCAB_SIZE, Grammars
from cluster.types import ReplicaInfo, ReplicaState
from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import EngineFailure, RankFailure

if TYPE_CHECKING:
    from cluster.simulate.replica import SimulatedReplica

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96
NUM_SLOTS = 8
NUM_BLOCKS = 100
STEP_S = (0.01, 0.05)
_KV_GROUPS = (KvGroupConfig((0,)), KvGroupConfig((1,), chunk_size=16))


class _Wake:
    """A condition variable where there is one thread only: whoever would wait for it asks ``event`` instead."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def __enter__(self) -> None:
        """Nobody else runs meanwhile."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody waits to enter."""

    def notify(self) -> None:
        self.event.set()

    def wait(self) -> None:
        raise AssertionError("a simulated loop takes a turn only where there is something to do")


class _Loop(EngineLoop):
    """The engine loop's turns in a task. A step's time passes before its turn; what comes meanwhile is in it.

    Args:
        process: whose it is.
        pass_step: returns when the time of the next step has passed.
        mend: returns when the engine has been reset after this failure. Raises EngineFailure where it never will be.
    """

    def __init__(
        self,
        engine: Engine,
        process: Process,
        pass_step: Callable[[], Awaitable[None]],
        mend: Callable[[EngineFailure], Awaitable[None]],
    ) -> None:
        super().__init__(engine, clock=asyncio.get_running_loop().time)
        self._process = process
        self._pass_step = pass_step
        self._mend = mend
        wake: Any = _Wake()
        self._wake = wake
        self._woken: asyncio.Event = wake.event

    def _launch(self) -> None:
        self._process.spawn(self._drive())

    async def _drive(self) -> None:
        failure: EngineFailure | None = None
        while failure is None:
            while self._has_nothing_to_do:
                self._woken.clear()
                await self._woken.wait()
            await self._pass_step()
            try:
                if not self._turn():
                    return
            except EngineFailure as error:
                failure = await self._repaired(error)
        self._end(failure)

    async def _repaired(self, error: EngineFailure) -> EngineFailure | None:
        self._begin_repair()
        try:
            await self._mend(error)
        except EngineFailure as final:
            return final
        self._end_repair()
        return None


class _Server(LeaderServer):
    """Serves on the simulated network."""

    def __init__(self, engine_loop: EngineLoop, info: ReplicaInfo, process: Process) -> None:
        super().__init__(engine_loop, info)
        self._process = process

    async def start(self) -> str:
        self._engine_loop.start(self._hand_over)
        service = ReplicaServicer(self)
        self._process.listen(self._info.address, lambda end: serve_call(service, end))
        return self._info.address

    def _hand_over(self, outputs: StepOutputs) -> None:
        asyncio.get_running_loop().call_soon(self._deliver_alive, outputs)

    def _deliver_alive(self, outputs: StepOutputs) -> None:
        if not self._process.is_dead:
            self._deliver(outputs)


class SimulatedLeader:
    """One life of a replica's leader, through all formations of its gang."""

    def __init__(self, replica: "SimulatedReplica", life: int) -> None:
        self.life = life
        self.address = f"{replica.host}:{life}"
        self.process = Process(f"leader {replica.name}.{life}", replica.host, replica.network)
        self.opened = asyncio.Event()
        """It lives, and can open a channel for its ranks."""
        self.moving = asyncio.Event()
        """Cleared while a rank that all others wait for is stopped: no step ends."""
        self.moving.set()
        self.awake = asyncio.Event()
        """Cleared while the process hangs."""
        self.awake.set()
        self.engine: Engine | None = None
        self.server: _Server | None = None
        self._loop: _Loop | None = None
        self._replica = replica
        self._gang: SimulatedGang | None = None
        self._epoch = -1
        self._formations: asyncio.Queue[int] = asyncio.Queue()
        self._incarnation = replica.chance.getrandbits(62)
        self.process.spawn(self._live())

    @property
    def is_serving(self) -> bool:
        return not self.process.is_dead and self._loop is not None and self._loop.state is ReplicaState.READY

    async def _live(self) -> None:
        await asyncio.sleep(self._replica.chance.uniform(0.2, 2.0))
        self.opened.set()
        self._epoch = await self._next_formation()
        self._gang = self._new_gang(self._epoch)
        self.engine = Engine(
            executor=self._gang,
            epoch=self._epoch,
            kv_groups=_KV_GROUPS,
            vocab_size=VOCAB_SIZE,
            scheduler_config=SchedulerConfig(NUM_SLOTS, 32, MAX_MODEL_LEN, depth=self._replica.depth),
            cache_config=CacheConfig(BLOCK_SIZE, NUM_BLOCKS),
        )
        self.engine.trials.on_explained = self._tell_explained
        self._loop = _Loop(self.engine, self.process, self._pass_step, self._mend)
        self.server = _Server(self._loop, self._info(), self.process)
        await self.server.start()
        self._replica.announce(self._replica)

    def _tell_explained(self, num_breaks: int) -> None:
        replica = self._replica
        replica.tell(lambda: replica.recovery.explained(num_breaks), 0.01)

    def _new_gang(self, epoch: int) -> SimulatedGang:
        return SimulatedGang(
            num_slots=NUM_SLOTS,
            kv_groups=_KV_GROUPS,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            vocab_size=VOCAB_SIZE,
            depth=self._replica.depth,
            epoch=epoch,
            dies_at=self._replica.poison,
            new_grammars=Grammars,
        )

    def _info(self) -> ReplicaInfo:
        return ReplicaInfo(
            id=self._replica.name,
            model="m",
            state=ReplicaState.STARTING,
            address=self.address,
            incarnation=self._incarnation,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=NUM_SLOTS,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
        )

    async def _pass_step(self) -> None:
        self._replica.num_steps += 1
        self._replica.on_step()
        await asyncio.sleep(self._replica.slowness * self._replica.chance.uniform(*STEP_S))
        await self.moving.wait()
        await self.awake.wait()

    async def _next_formation(self) -> int:
        epoch = await self._formations.get()
        await self.awake.wait()
        return epoch

    def formed(self, epoch: int) -> None:
        """All ranks of this formation are ready."""
        self._formations.put_nowait(epoch)

    def give_up(self) -> None:
        """There will be no other formation."""
        self._formations.put_nowait(-1)

    def lose_gang(self, error: RankFailure, after_s: float) -> None:
        """The present formation breaks now; the leader knows of it then."""
        gang, loop = self._gang, self._loop
        if gang is None or loop is None:
            return
        gang.close()
        asyncio.get_running_loop().call_later(after_s, loop.fail, error, lambda: self._gang is gang)

    async def _mend(self, error: EngineFailure) -> None:
        assert self.engine is not None
        epoch, replica = self._epoch, self._replica
        culprit = error.rank if isinstance(error, RankFailure) else None
        replica.tell(lambda: replica.recovery.gang_broke(epoch, culprit, str(error), replica.now_s()), 0.01)
        while self._epoch <= epoch:
            formed = await self._next_formation()
            if formed < 0:
                raise EngineFailure(f"the gang could not be repaired: {error}")
            self._epoch = max(self._epoch, formed)
        self._gang = self._new_gang(self._epoch)
        self.engine.reset(self._epoch, executor=self._gang)

    async def drain(self) -> None:
        """Takes no new requests."""
        await self.awake.wait()
        if self.server is not None:
            await self.server.drain()
