"""OpenAI's paths where other servers have them, for clients whose paths are fixed."""

from starlette.types import ASGIApp, Receive, Scope, Send

WITHOUT_DONE = "remuda.without_done"
"""In a request's scope: its client takes the ``[DONE]`` at the end of a stream for JSON."""

_GROQ = "/openai/v1/"
_LLAMA_STACK = "/v1/openai/v1/"


class OtherPrefixes:
    """Outside the gate: what a path asks for is decided by the path that is served.

    Args:
        app: what is inside. It sees paths that begin with /v1/.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(_below_v1(scope) if scope["type"] == "http" else scope, receive, send)


def _below_v1(scope: Scope) -> Scope:
    path: str = scope["path"]
    for prefix in (_GROQ, _LLAMA_STACK):
        if path.startswith(prefix):
            return {**scope, "path": f"/v1/{path.removeprefix(prefix)}", WITHOUT_DONE: prefix == _LLAMA_STACK}
    return scope
