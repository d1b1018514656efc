"""The root of Remuda's one error tree, and the errors that the engine itself can raise.

    RemudaError
    ├── InvalidInput              the caller can mend it; raised before any work begins
    │   ├── InvalidOption         an option of a command or a configuration file
    │   ├── LayoutError           a parallel layout that the model or the machines do not allow
    │   ├── CheckpointError       a checkpoint that is missing, misshaped or not supported
    │   ├── AdapterError          a LoRA adapter of which the same is true, or that there is no room for
    │   └── InvalidRequest        a field of one request (``param`` names it)
    │       └── ContextLengthExceeded
    ├── DoesNotFit                the model, cache or context does not fit in memory
    ├── Overloaded                a bounded queue is full; the caller should come back later
    └── EngineFailure             something of ours broke; nothing the caller wrote was wrong
        ├── RankFailure           a rank died, hung or raised
        ├── RequestFailure        one request could not go on; the others do
        └── ProtocolViolation     a message that the step protocol forbids

``cluster.errors`` adds those of the serving side and maps every class to one exit code, one HTTP status, one
OpenAI code and one gRPC status.
"""


class RemudaError(Exception):
    """Base of every error that Remuda raises on purpose. The message names the bad value and the remedy."""


class InvalidInput(RemudaError, ValueError):
    """The caller can mend it. Raised before any work begins."""


class InvalidOption(InvalidInput):
    """A bad value of an option or of a configuration file."""


class LayoutError(InvalidInput):
    """A parallel layout that the model or the machines do not allow."""


class CheckpointError(InvalidInput):
    """A checkpoint that is missing, incomplete, misshaped or not supported."""


class AdapterError(InvalidInput):
    """A LoRA adapter that is missing, misshaped, not supported or unknown, or for which there is no room."""


class InvalidRequest(InvalidInput):
    """A bad field of one request.

    Args:
        message: what is wrong and what would be right.
        param: the field's name as the client wrote it, for example ``temperature``.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested output together are longer than the model or the cache can hold."""


class DoesNotFit(RemudaError):
    """The model, its cache or one context does not fit into the memory that there is."""


class Overloaded(RemudaError):
    """A bounded queue is full.

    Args:
        message: which queue, and its bound.
        retry_after_s: seconds after which a new try is reasonable.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailure(RemudaError):
    """Something of ours broke."""


class RankFailure(EngineFailure):
    """A rank died, hung or raised.

    Args:
        message: what was seen.
        rank: the global rank, or None where it is not known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RequestFailure(EngineFailure):
    """The engine could not go on with one request, and would not if it were asked again. The others go on."""


class ProtocolViolation(EngineFailure):
    """A message that the step protocol forbids (docs/step_protocol.md)."""
