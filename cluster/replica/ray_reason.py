"""What an error of Ray's says, in few words."""


def ray_reason(error: Exception) -> str:
    """Ray's messages hold whole tracebacks, and advice; the first sentence of the last line says what it was."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip().split(". ")[0] if lines else type(error).__name__
