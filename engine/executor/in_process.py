"""A gang of one rank that is a thread of this process: the least that serves a model."""

import threading

import msgspec

from engine.errors import LayoutError
from engine.executor.channel import RankChannel
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.gang_start import GangReady, OnMessage
from engine.executor.queue_channel import queue_channel
from engine.executor.worker import serve_rank
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig

_END_TIMEOUT_S = 30.0


class InProcessExecutor(ChannelExecutor):
    """Starts at construction; ``ready`` says what came of it. See ChannelExecutor and GangStart for what is raised.

    Args:
        config: its rank, channel and store mean nothing here.
        max_model_len: None for the longest that fits.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        max_model_len: int | None = None,
        on_message: OnMessage = lambda message: None,
    ) -> None:
        if config.parallel.num_ranks != 1:
            raise LayoutError(f"one process holds one rank, not {config.parallel.num_ranks}; use a ProcessGang")
        leader, rank = queue_channel()
        super().__init__(leader, config.parallel, epoch=config.epoch)
        self._thread = threading.Thread(
            target=_serve, args=(msgspec.structs.replace(config, rank=0), rank), name="rank-0", daemon=True
        )
        self._thread.start()
        try:
            self.ready: GangReady = self.start(
                ModelConfig.from_directory(config.model, config.quantization),
                block_size=config.block_size,
                max_model_len=max_model_len,
                on_message=on_message,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self._thread.join(_END_TIMEOUT_S)


def _serve(config: WorkerConfig, channel: RankChannel) -> None:
    try:
        serve_rank(config, channel)
    except Exception:  # noqa: BLE001 - serve_rank has reported it to the leader, who raises it
        pass
    finally:
        channel.close()
