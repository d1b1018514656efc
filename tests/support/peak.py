"""What torch's allocator held at most."""

from collections.abc import Callable

from torch.autograd.profiler import profile


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that were allocated at once while ``function`` ran, beyond those before it."""
    with profile(profile_memory=True) as profiled:
        function()
    changes = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
