"""Single experts read from a checkpoint while their model is served, as the loader reads them: by offset, this rank's
part of each only."""

import os
from collections.abc import Callable
from pathlib import Path

from engine.config import LoadFormat
from engine.errors import CheckpointError
from engine.layers.experts import StagedExpert
from engine.model_config import ModelConfig
from engine.weights.dummy import fill_with_random_values
from engine.weights.loader import open_checkpoint, read_pieces


class MoveCancelled(Exception):
    """Whoever wanted the expert no longer does."""


class ExpertReader:
    """To be made when the model has just been loaded: a file that changes afterwards is not read. One thread at a time.

    Raises CheckpointError where the checkpoint cannot be opened.
    """

    def __init__(self, directory: str | Path, config: ModelConfig, load_format: LoadFormat) -> None:
        self._checkpoint = None if load_format is LoadFormat.DUMMY else open_checkpoint(directory, config)
        self._marks = self._marks_now()

    def fill(self, staged: StagedExpert, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Raises CheckpointError where a file has changed or cannot be read, and MoveCancelled."""
        if self._checkpoint is None:
            fill_with_random_values(staged.slices, staged.conversions, lambda done, total: None)
            return
        self._check_files()
        try:
            for _ in read_pieces(self._checkpoint, staged):
                if is_cancelled():
                    raise MoveCancelled
        except OSError as error:
            raise CheckpointError(f"expert {staged.expert} cannot be read: {error}") from error
        self._check_files()

    def _check_files(self) -> None:
        """Weights of two checkpoints must not meet in one model."""
        for path, mark in self._marks_now().items():
            if mark != self._marks[path]:
                raise CheckpointError(f"{path} is not the file that the model was loaded from")

    def _marks_now(self) -> dict[Path, tuple[int, int, int]]:
        if self._checkpoint is None:
            return {}
        try:
            stats = {path: os.stat(path) for path in self._checkpoint.file_bytes}
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
        return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
