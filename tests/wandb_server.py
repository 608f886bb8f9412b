"""A W&B server on the loopback interface, so that tests run the real `wandb` client.

    with WandbServer() as server, server.client(tmp_path) as wandb:  # or a process with server.environment(tmp_path)
        with wandb.init(id="first", config={"seed": 1}) as run:
            run.log({"loss": 0.5})
    assert server.runs["first"].history[0]["loss"] == 0.5

It answers what wandb 0.31 sends to start, resume, log and finish runs, and to log, use, find, list, download and change
artifacts; what the client uploads stays in memory. As at W&B's service, content that a collection already has makes no
new version, a new version is `latest`, and an alias belongs to one version of its collection. Not covered: registries
and links, uploads in parts, incremental artifacts, tables, sweeps, permissions. An operation that is not covered is an
error for the client, and its name is in `refused`.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self
from unittest.mock import patch
from urllib.parse import quote, unquote, urlsplit
from uuid import uuid4

ENTITY = "team"
PROJECT = "rec"
MANIFEST = "wandb_manifest.json"
TIME = "2026-01-01T00:00:00Z"  # of everything
USER = {
    "id": "user",
    "name": "user",
    "username": "user",
    "email": "",
    "flags": "{}",
    "admin": False,
}
# Two attempts, a second apart. The client rounds seconds down, and takes 0 for its default, which is minutes in all.
RETRIES = {
    "RETRY_MAX": "1",
    "RETRY_WAIT_MIN_SECONDS": "1",
    "RETRY_WAIT_MAX_SECONDS": "1",
    "TIMEOUT_SECONDS": "9",
}
DIRECTORIES = ("DIR", "DATA_DIR", "CACHE_DIR", "ARTIFACT_DIR", "CONFIG_DIR")

Fields = dict[str, Any]


@dataclass
class Run:
    id: str
    project: str
    job_type: str | None = None
    config: Fields = field(default_factory=dict)
    history: list[Fields] = field(
        default_factory=list
    )  # what was logged, and _step, _runtime, _timestamp
    summary: Fields = field(default_factory=dict)
    finished: bool = False
    used: list[str] = field(default_factory=list)  # names of versions
    logged: list[str] = field(default_factory=list)


@dataclass
class Version:
    """One version of an artifact. It counts, and gets `wanted` as its aliases, once it is committed."""

    project: str
    collection: str
    index: int
    type: str
    digest: str
    run: str  # id of the run that logged it
    metadata: Fields
    aliases: set[str] = field(default_factory=set)
    manifest: Fields = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False
    wanted: set[str] = field(default_factory=set)
    id: str = field(default_factory=lambda: uuid4().hex)  # unique, because the client caches by it

    @property
    def name(self) -> str:
        return f"{self.collection}:v{self.index}"


class WandbServer:
    """Serves inside its `with` block, on a free port; what it was told can be read at any time.

    `fail` makes requests fail: all of them (True), the next so many (a number), or those whose entry in `requests`
    contains a text, such as "AddAliases", "file_stream" or "storage".
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.versions: list[Version] = []  # of all collections, committed or not, oldest first
        self.fail: bool | int | str = False
        self.requests: list[str] = []  # the GraphQL operation, or else method and path
        self.refused: list[str] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, directory: Path) -> dict[str, str]:
        """The environment variables of a client that keeps its files under `directory` and soon gives up."""
        for name in DIRECTORIES:
            (directory / name.lower()).mkdir(parents=True, exist_ok=True)
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_ENTITY": ENTITY,
            "WANDB_PROJECT": PROJECT,
            "WANDB_MODE": "online",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_INIT_TIMEOUT": "10",
            "WANDB_FINISH_TIMEOUT": "10",
            "WANDB__DISABLE_STATS": "true",
            "WANDB__DISABLE_META": "true",
            **{f"WANDB_{name}": str(directory / name.lower()) for name in DIRECTORIES},
            **{
                f"WANDB__{of}_{k}": v
                for of in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
                for k, v in RETRIES.items()
            },
        }

    @contextmanager
    def client(self, directory: Path) -> Iterator[ModuleType]:
        """The wandb module as a client of this server, in this process; nothing of it is left after the block."""
        import wandb

        others = {
            name: value for name, value in os.environ.items() if not name.startswith("WANDB_")
        }
        variables = patch.dict(os.environ, {**others, **self.environment(directory)}, clear=True)
        with (
            variables,
            patch.object(sys, "excepthook", sys.excepthook),
        ):  # a run replaces the hook for good
            wandb.teardown()
            try:
                yield wandb
            finally:
                if wandb.run:  # a failure has left it open: its thread would outlive the connection
                    wandb.run.finish()
                wandb.teardown()

    def collection(self, name: str, project: str = PROJECT) -> list[Version]:
        """The committed versions of an artifact, oldest first."""
        return [
            v for v in self.versions if v.committed and (v.project, v.collection) == (project, name)
        ]

    def find(self, name: str, project: str = PROJECT) -> Version | None:
        """The version that COLLECTION:ALIAS or COLLECTION:vN names."""
        collection, _, alias = name.partition(":")
        return next(
            (
                v
                for v in self.collection(collection, project)
                if alias in {*v.aliases, f"v{v.index}"}
            ),
            None,
        )

    def damage(self, name: str, path: str) -> None:
        """Changes the first byte of a stored file. A client that has the file in its cache will not notice."""
        version = self.find(name)
        assert version, name
        first, *rest = version.files[path]
        version.files[path] = bytes([first ^ 1, *rest])

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, content: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to one request."""
        sent = json.loads(content) if path == "/graphql" else {}
        operation = re.search(r"(?:query|mutation) (\w+)", sent.get("query", ""))
        request = operation[1] if operation else f"{method} {path}"
        with self._lock:
            self.requests.append(request)
            if self._fails(request):
                # The client's downloads repeat after a 500, for 20 minutes whatever the settings; not after a 404.
                return 404 if method == "GET" else 500, b"{}"
            if operation:
                return self._graphql(request, sent.get("variables") or {})
            return self._file(method, path, content)

    def _fails(self, request: str) -> bool:
        if not self.fail or self.fail is True:
            return bool(self.fail)
        if isinstance(self.fail, str):
            return self.fail in request
        self.fail -= 1
        return True

    def _file(self, method: str, path: str, content: bytes) -> tuple[int, bytes]:
        _, kind, owner, name = unquote(path).split("/", 3)
        if kind == "files":  # /files/ENTITY/PROJECT/RUN/file_stream
            self._log(self.runs[name.split("/")[1]], json.loads(content))
        if kind != "storage":  # the run's own files are not kept
            return 200, b"{}"
        version = self._by_id(owner)
        if method == "GET":
            return 200, json.dumps(
                version.manifest
            ).encode() if name == MANIFEST else version.files[name]
        if name == MANIFEST:
            version.manifest = json.loads(content)
        else:
            version.files[name] = content
        return 200, b"{}"

    def _log(self, run: Run, sent: Fields) -> None:
        files = sent.get("files", {})
        if history := files.get("wandb-history.jsonl"):
            run.history[history["offset"] :] = map(json.loads, history["content"])
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        run.finished = bool(sent.get("complete"))

    def _graphql(self, operation: str, variables: Fields) -> tuple[int, bytes]:
        method = getattr(
            self, "_on_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).lower(), None
        )
        if method is None:
            self.refused.append(operation)
            return 400, json.dumps(
                {"errors": [{"message": f"{operation} is not covered"}]}
            ).encode()
        return 200, json.dumps(
            {"data": method(SimpleNamespace(**variables.get("input", variables)))}
        ).encode()

    # --- GraphQL: a method for each operation. The client ignores fields that it did not ask for. ---------------------

    def _on_viewer(self, given: Any) -> Fields:
        return {
            "viewer": {
                **USER,
                "entity": ENTITY,
                "deletedAt": None,
                "apiKeys": None,
                "teams": {"edges": []},
            }
        }

    _on_get_viewer = _on_get_default_entity = _on_viewer

    def _on_server_features_query(self, given: Any) -> Fields:
        return {"serverInfo": {"features": []}}

    def _on_run_resume_status(self, given: Any) -> Fields:
        run = self.runs.get(given.name)
        return {"model": {**_project(given.project), "bucket": run and _run(run)}}

    def _on_upsert_bucket(self, given: Any) -> Fields:
        inserted = given.name not in self.runs
        run = self.runs.setdefault(given.name, Run(given.name, given.project))
        run.job_type = given.jobType or run.job_type
        config = json.loads(given.config or "{}")
        run.config |= {key: entry["value"] for key, entry in config.items() if key != "_wandb"}
        return {"upsertBucket": {"bucket": _run(run), "inserted": inserted}}

    def _on_create_run_files(self, given: Any) -> Fields:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/run/{given.run}/{quote(name)}"}
            for name in given.files
        ]
        return {"createRunFiles": {"runID": given.run, "uploadHeaders": [], "files": files}}

    def _on_run(self, given: Any) -> Fields:
        run = self.runs.get(given.name)
        return {"project": {"run": run and _run(run)}}

    def _on_create_artifact(self, given: Any) -> Fields:
        name = given.artifactCollectionName
        before = self.collection(name, given.projectName)
        version = next((earlier for earlier in before if earlier.digest == given.digest), None)
        if version is None:
            metadata = json.loads(given.metadata or "{}")
            about = (given.artifactTypeName, given.digest, given.runName, metadata)
            self.versions.append(version := Version(given.projectName, name, len(before), *about))
        version.wanted = {entry["alias"] for entry in given.aliases or []}
        if version.committed:
            self._move(version.wanted, version)
        fields = _artifact(version)
        fields["artifactSequence"]["latestArtifact"] = {"id": before[-1].id} if before else None
        return {"createArtifact": {"artifact": fields}}

    def _on_create_artifact_files(self, given: Any) -> Fields:
        nodes = []
        for file in given.artifactFiles:
            place = {"storagePath": file["name"], "artifact": {"id": file["artifactID"]}}
            upload = {"uploadUrl": self._url(file["artifactID"], file["name"]), "uploadHeaders": []}
            nodes.append(place | upload)
        return {"createArtifactFiles": {"files": _edges(nodes)}}

    def _on_create_artifact_manifest(self, given: Any) -> Fields:
        file = {
            "id": MANIFEST,
            "uploadUrl": self._url(given.artifactID, MANIFEST),
            "uploadHeaders": [],
        }
        return {
            "createArtifactManifest": {"artifactManifest": {"id": given.artifactID, "file": file}}
        }

    def _on_commit_artifact(self, given: Any) -> Fields:
        version = self._by_id(given.artifactID)
        version.committed = True
        self._move({"latest", *version.wanted}, version)
        self.runs[version.run].logged.append(version.name)
        return {"commitArtifact": {"artifact": _artifact(version)}}

    def _on_use_artifact(self, given: Any) -> Fields:
        version = self._by_id(given.artifactID)
        self.runs[given.runName].used.append(version.name)
        return {"useArtifact": {"artifact": _artifact(version)}}

    def _on_artifact_by_id(self, given: Any) -> Fields:
        return {"artifact": _artifact(self._by_id(given.id))}

    def _on_artifact_created_by(self, given: Any) -> Fields:
        return {"artifact": {"createdBy": _run(self.runs[self._by_id(given.id).run])}}

    def _on_artifact_type(self, given: Any) -> Fields:
        version = self.find(given.name, given.project)
        return {"project": {"artifact": version and _artifact(version)}}

    def _on_artifact_membership_by_name(self, given: Any) -> Fields:
        version = self.find(given.name, given.project)
        return {"project": {"artifactCollectionMembership": version and _membership(version)}}

    def _on_project_artifacts(self, given: Any) -> Fields:
        versions = [
            v for v in self.collection(given.collection, given.project) if v.type == given.type
        ]
        artifacts = {
            **_edges([_artifact(v) for v in reversed(versions)]),
            "totalCount": len(versions),
        }
        for edge in artifacts["edges"]:
            edge["version"] = f"v{edge['node']['versionIndex']}"
        collection = {"__typename": "ArtifactSequence", "artifacts": artifacts}
        return {
            "project": {"artifactType": {"artifactCollection": collection if versions else None}}
        }

    def _on_fetch_artifact_manifest(self, given: Any) -> Fields:
        return {
            "artifact": {"currentManifest": {"file": {"directUrl": self._url(given.id, MANIFEST)}}}
        }

    def _on_get_artifact_membership_file_urls(self, given: Any) -> Fields:
        version = self.find(f"{given.collection}:{given.alias}", given.project)
        if version is None:
            return {"project": {"artifactCollection": None}}
        files = [
            {"__typename": "File", "name": n, "directUrl": self._url(version.id, n)}
            for n in version.files
        ]
        membership = {
            "__typename": "ArtifactSequence",
            "artifactMembership": {"files": _edges(files)},
        }
        return {"project": {"artifactCollection": membership}}

    def _on_add_aliases(self, given: Any) -> Fields:
        self._move({entry["alias"] for entry in given.aliases}, self._by_id(given.artifactID))
        return {"result": {"success": True}}

    def _on_delete_aliases(self, given: Any) -> Fields:
        self._by_id(given.artifactID).aliases -= {entry["alias"] for entry in given.aliases}
        return {"result": {"success": True}}

    def _on_update_artifact(self, given: Any) -> Fields:
        version = self._by_id(given.artifactID)
        version.metadata = json.loads(given.metadata)
        return {"result": {"artifact": _artifact(version)}}

    def _by_id(self, wanted: str) -> Version:
        return next(version for version in self.versions if version.id == wanted)

    def _url(self, artifact: str, name: str) -> str:
        return f"{self.url}/storage/{artifact}/{quote(name)}"

    def _move(self, aliases: set[str], version: Version) -> None:
        for other in self.collection(version.collection, version.project):
            other.aliases -= aliases
        version.aliases |= aliases


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open

    def __init__(self, server: WandbServer, *arguments: Any) -> None:
        self.wandb = server
        super().__init__(*arguments)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client may leave at any time
            super().handle()

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body = self.wandb.answer(self.command, urlsplit(self.path).path, content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


# --- The state in GraphQL's words -------------------------------------------------------------------------------------


def _edges(nodes: list[Fields]) -> Fields:
    return {
        "pageInfo": {"endCursor": None, "hasNextPage": False},
        "edges": [{"node": node} for node in nodes],
    }


def _project(name: str) -> Fields:
    return {"id": name, "internalId": name, "name": name, "entity": {"id": ENTITY, "name": ENTITY}}


def _run(run: Run) -> Fields:
    return {
        "__typename": "Run",
        **dict.fromkeys(("id", "name", "displayName"), run.id),
        "project": _project(run.project),
        "projectId": 1,
        "user": USER,
        "jobType": run.job_type,
        "state": "finished" if run.finished else "running",
        "tags": [],
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        **{"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]"},
        "wandbConfig": '{"t": {}}',  # without it, a resumed run would count its steps from 0
    }


def _artifact(version: Version) -> Fields:
    sequence = {
        "__typename": "ArtifactSequence",
        "name": version.collection,
        "project": _project(version.project),
    }
    return {
        "__typename": "Artifact",
        "id": version.id,
        "artifactSequence": sequence,
        "artifactType": {"name": version.type},
        "versionIndex": version.index,
        "aliases": [{**alias, "artifactCollection": sequence} for alias in _aliases(version)],
        "metadata": json.dumps(version.metadata),
        "state": "COMMITTED" if version.committed else "PENDING",
        "digest": version.digest,
        "size": sum(map(len, version.files.values())),
        "fileCount": len(version.files),
        "tags": [],
        "createdAt": TIME,
        **dict.fromkeys(("description", "historyStep", "commitHash", "updatedAt")),
        **{"ttlDurationSeconds": -2, "ttlIsInherited": True},
    }


def _aliases(version: Version) -> list[Fields]:
    return [
        {"__typename": "ArtifactAlias", "id": alias, "alias": alias}
        for alias in sorted(version.aliases)
    ]


def _membership(version: Version) -> Fields:
    artifact = _artifact(version)
    return {
        "__typename": "ArtifactCollectionMembership",
        "id": version.id,
        "versionIndex": version.index,
        "createdAt": TIME,
        "artifactCollection": artifact["artifactSequence"],
        "aliases": _aliases(version),
        "artifact": artifact,
    }
