"""A mock Kubernetes API server (kmock) that Helm takes for a real one. Pods that it is given end well at once.

It keeps objects in memory and answers as an API server does, and that is all. It does not validate, default, admit or
authorise anything, evaluates no CEL, runs no controller (so nothing becomes ready and no pod of a workload exists), and
merges server-side applies key by key, whoever owns a field. What is asked of it here is only what Helm does in which
order.
"""

import asyncio
import json
import socket
import ssl
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import attrs
import kmock
import yaml
from aiohttp import web

from tests.chart.rendering import Document

_PLURALS = {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"}
_VERBS = {"create", "delete", "get", "list", "patch", "update", "watch"}
_CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding", "Node"}


def plural(kind: str) -> str:
    return _PLURALS.get(kind, f"{kind.lower()}s")


def _group_version(document: Document) -> tuple[str, str]:
    group, _, version = document["apiVersion"].rpartition("/")
    return group, version


@attrs.define(kw_only=True)
class MockApiServer(kmock.KubernetesEmulator):
    """kmock's, with what Helm needs beside: server-side apply of what does not exist yet, uids, and OpenAPI documents
    that say that the server validates. ``seen`` is what was asked, as (method, path)."""

    git_version: str = "v1.37.0"
    seen: list[tuple[str, str]] = attrs.field(factory=list)
    tokens: set[str] = attrs.field(factory=set)
    """What was shown in ``Authorization``."""

    def serve_kinds_of(self, documents: list[Document]) -> None:
        for document in documents:
            kind = document["kind"]
            self.resources[kmock.resource(*_group_version(document), plural(kind))] = kmock.ResourceInfo(
                namespaced=kind not in _CLUSTER_WIDE, kind=kind, singular=kind.lower(), verbs=_VERBS
            )

    async def _handle(self, request: Any) -> Any:
        self.seen.append((request.method.value, request.url.path))
        self.tokens.update(value for key, value in request.headers.items() if key.lower() == "authorization")
        if request.url.path.startswith("/openapi/v3"):
            return await self._openapi(request.url.path)
        self._interpret(request)
        return await super()._handle(request)

    def _interpret(self, request: Any) -> None:
        """A server-side apply is YAML, and makes what does not exist; what is made gets a uid, and a pod ends well."""
        if request.method.value not in ("PATCH", "POST", "PUT") or request.resource is None:
            return
        body = yaml.safe_load(request.body)
        key = (request.resource, request.namespace, request.name or body.get("metadata", {}).get("name"))
        is_new = key not in self.objects or self.objects[key].deleted
        if is_new and request.method.value in ("PATCH", "POST"):
            body.setdefault("metadata", {}).update(uid=uuid.uuid4().hex, namespace=request.namespace)
            if body.get("kind") == "Pod":
                body["status"] = {"phase": "Succeeded"}
            object.__setattr__(request, "action", kmock.action.CREATE)
        # Requests are frozen, and kmock knows them by identity.
        object.__setattr__(request, "data", body)

    async def _serve_list(self, request: Any) -> Any:
        kind = self.resources[request.resource].kind
        answer: Any = await super()._serve_list(request)
        return {**answer, "apiVersion": "v1", "kind": f"{kind}List"}

    async def _serve_server_version(self, request: Any) -> Any:
        major, minor = self.git_version.removeprefix("v").split(".")[:2]
        return {"major": major, "minor": minor, "gitVersion": self.git_version}

    async def _serve_version(self, request: Any) -> Any:
        answer: Any = await super()._serve_version(request)
        return {**answer, "groupVersion": answer["groupVersion"].lstrip("/")}

    async def _openapi(self, path: str) -> Any:
        groups: dict[str, list[Any]] = {}
        for resource in self._get_resources():
            where = f"apis/{resource.group}/{resource.version}" if resource.group else f"api/{resource.version}"
            groups.setdefault(where, []).append(resource)
        wanted = path.removeprefix("/openapi/v3").lstrip("/")
        if not wanted:
            answer: Any = {"paths": {where: {"serverRelativeURL": f"/openapi/v3/{where}?hash=0"} for where in groups}}
        else:
            answer = {"openapi": "3.0.0", "info": {"title": "", "version": ""}, "paths": self._patches(groups[wanted])}
        return web.json_response(answer)

    def _patches(self, resources: list[Any]) -> Document:
        return {
            f"/{resource.plural}/{{name}}": {
                "patch": {
                    "parameters": [{"name": "fieldValidation", "in": "query"}],
                    "responses": {},
                    "x-kubernetes-group-version-kind": {
                        "group": resource.group,
                        "version": resource.version,
                        "kind": self.resources[resource].kind,
                    },
                }
            }
            for resource in resources
        }

    def existing(self) -> dict[tuple[str, str], Document]:
        """(kind, name) → object, of all that exist."""
        return {
            (self.resources[resource].kind or "", name): kept.raw
            for (resource, _, name), kept in self.objects.items()
            if not kept.deleted
        }


class RunningServer:
    """``api`` is of another thread: look at it while nobody asks it anything."""

    def __init__(self, api: MockApiServer, url: str) -> None:
        self.api = api
        self.url = url.rstrip("/")

    def kubeconfig(self, namespace: str) -> str:
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "mock", "cluster": {"server": self.url}}],
                "users": [{"name": "anybody", "user": {}}],
                "contexts": [{"name": "c", "context": {"cluster": "mock", "user": "anybody", "namespace": namespace}}],
                "current-context": "c",
            }
        )


@attrs.define(frozen=True)
class TlsEntry:
    """``socket``: bound already, in whatever network."""

    socket: socket.socket
    context: ssl.SSLContext


@contextmanager
def running_server(
    documents: list[Document], git_version: str = "v1.37.0", entry: TlsEntry | None = None
) -> Iterator[RunningServer]:
    """On a free port of this machine, in a thread of its own, serving the kinds of ``documents``; with ``entry`` also
    there."""
    ready, found = threading.Event(), list[RunningServer]()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        api = MockApiServer(git_version=git_version)
        api.serve_kinds_of(documents)
        async with api, kmock.Server(api) as server, _entered(api, entry):
            found.append(RunningServer(api, str(server.url)))
            ready.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="mock API server")
    thread.start()
    assert ready.wait(20)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)


@asynccontextmanager
async def _entered(api: MockApiServer, entry: TlsEntry | None) -> AsyncIterator[None]:
    if entry is None:
        yield
        return
    # Watches never end by themselves; 0 would wait for them for ever.
    runner = web.ServerRunner(web.Server(api), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.SockSite(runner, entry.socket, ssl_context=entry.context).start()
        yield
    finally:
        await runner.cleanup()
