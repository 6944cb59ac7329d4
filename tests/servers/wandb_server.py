"""A local stand-in for a W&B server: what the real `wandb` client, its command line and wandb-workspaces speak with.

    python tests/servers/wandb_server.py --folder FOLDER [--port 0] [--key-required KEY]

prints `{"port": N}` and serves 127.0.0.1 until it is ended. Clients find it by WANDB_BASE_URL. What it receives lies in
FOLDER as JSON, written anew after every change:

runs/ID.json       group, job type, tags, notes, config (unwrapped), summary, history, events (system metrics), state,
                   exit code, sweep, the artifacts that it logged and used
runs/ID/NAME       the files that were uploaded for it
artifacts/ID.json  name, type, digest, state, aliases, metadata, version, created_by (run), used_by (runs), manifest
artifacts/ID/NAME  its files
sweeps/ID.json     the configuration, the runs that agents were given, the state
views/ID.json      workspaces and reports

As on the real server, an artifact whose collection holds its digest already is not made again, and a sweep of method
grid hands every combination to one agent once. GET /stats counts operations and names those that it does not know.
POST /faults [{"operation": NAME, "times": N}] lets the next N calls of one fail with status 500.
Format: https://github.com/wandb/wandb, whose queries are answered by name, with every field that any of them selects.
"""

import argparse
import asyncio
import base64
import itertools
import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

ENTITY = "local"
OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")
CREATED = "2026-11-23T12:00:00Z"
NO_PAGE = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
# Tables of a run's file stream -> where they are kept; each line is one JSON object.
STREAMS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events"}


def _id(kind: str, *parts: Any) -> str:
    """An opaque id, which clients take apart nowhere: base64 of what it names."""
    return base64.urlsafe_b64encode(":".join([kind, *map(str, parts)]).encode()).decode()


class Store:
    """What was received: one dictionary a thing, each a JSON file in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.kinds: dict[str, dict[str, dict[str, Any]]] = {
            "runs": {},
            "artifacts": {},
            "sweeps": {},
            "views": {},
            "projects": {},
        }

    def __getitem__(self, kind: str) -> dict[str, dict[str, Any]]:
        return self.kinds[kind]

    def save(self, kind: str, name: str) -> None:
        path = self.folder / kind / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.kinds[kind][name], indent=1), "utf-8")

    def put(self, kind: str, name: str, thing: dict[str, Any]) -> dict[str, Any]:
        self.kinds[kind][name] = thing
        self.save(kind, name)
        return thing

    def write(self, path: str, content: bytes) -> None:
        """Raises HTTPBadRequest for a path that leads out of the folder."""
        target = (self.folder / path).resolve()
        if self.folder.resolve() not in target.parents:
            raise web.HTTPBadRequest(text=f"{path} is outside of the store")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


class Server:
    """Operations of the protocol are methods named after them: `variables` in, the response's data out."""

    def __init__(self, store: Store, key: str | None):
        self.store, self.key = store, key
        self.operations: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.failing: Counter[str] = Counter()
        self.origin = ""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.post("/graphql", self.graphql),
                web.post("/files/{entity}/{project}/{run}/file_stream", self.file_stream),
                web.put("/upload/{path:.+}", self.upload),
                web.get("/download/{path:.+}", self.download),
                web.get("/stats", self.stats),
                web.post("/faults", self.faults),
            ]
        )
        return app

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response({"operations": self.operations, "unknown": self.unknown})

    async def faults(self, request: web.Request) -> web.Response:
        self.failing = Counter({rule["operation"]: rule["times"] for rule in await request.json()})
        return web.json_response({})

    async def graphql(self, request: web.Request) -> web.Response:
        self._authorize(request)
        self.origin = f"http://{request.host}"
        body = await request.json()
        found = OPERATION.search(body["query"])
        name = found.group(1) if found else ""
        self.operations[name] += 1
        if self.failing[name] > 0:
            self.failing[name] -= 1
            return web.json_response({"errors": [{"message": "fault asked for"}]}, status=500)
        method = getattr(self, "on_" + name[:1].upper() + name[1:], None)
        if method is None:
            self.unknown[name] += 1
            return web.json_response({"errors": [{"message": f"this stand-in does not know {name}"}]}, status=400)
        data = method(body.get("variables") or {})
        if data is None:
            return web.json_response({"errors": [{"message": f"{name}: not found"}]}, status=404)
        return web.json_response({"data": data})

    def _authorize(self, request: web.Request) -> None:
        """A key is asked for, as basic authentication; it is kept nowhere."""
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        try:
            user, _, key = base64.b64decode(value).decode().partition(":")
        except ValueError:
            user = key = ""
        if scheme != "Basic" or user != "api" or (key != self.key if self.key else len(key) < 40):
            raise web.HTTPUnauthorized(text=json.dumps({"errors": [{"message": "permission denied"}]}))

    # The user, the server and its projects.

    def on_Viewer(self, _: Mapping[str, Any]) -> dict[str, Any]:
        user = {"id": _id("User", 1), "name": ENTITY, "username": ENTITY, "email": "local@example.org", "flags": "{}"}
        none = {"edges": []}
        return {"viewer": {**user, "entity": ENTITY, "admin": False, "deletedAt": None, "teams": none, "apiKeys": none}}

    on_GetViewer = on_GetDefaultEntity = on_Viewer

    def on_ServerInfo(self, _: Mapping[str, Any]) -> dict[str, Any]:
        limits = {"max_cli_version": "1.0.0", "min_cli_version": "0.10.0"}
        return {"serverInfo": {"cliVersionInfo": limits, "latestLocalVersionInfo": None, "features": []}}

    on_ServerFeaturesQuery = on_ServerInfo

    def on_XXHashDigestsEnabled(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def on_OrganizationCoreWeaveOrganizationID(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _project(self, name: str | None, entity: str | None) -> dict[str, Any]:
        name, entity = name or "uncategorized", entity or ENTITY
        fields = {"id": _id("Project", entity, name), "internalId": _id("ProjectInternal", entity, name), "name": name}
        fields |= {
            "__typename": "Project",
            "entityName": entity,
            "entity": {"id": _id("Entity", entity), "name": entity},
        }
        fields |= {"createdAt": CREATED, "isBenchmark": False, "description": None, "access": "PRIVATE", "views": "{}"}
        return {**fields, "readOnly": False, "user": None, "tags": []}

    def on_GetProject(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables.get("projectName") or variables.get("project")
        return {"project": self._project(name, variables.get("entity") or variables.get("entityName"))}

    on_ProjectInternalId = on_IsProjectReadOnly = on_GetProject

    def on_GetProjects(self, _: Mapping[str, Any]) -> dict[str, Any]:
        edges = [{"node": project, "cursor": ""} for project in self.store["projects"].values()]
        return {"models": {"pageInfo": NO_PAGE, "edges": edges}}

    def on_CreateProject(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        project = self._known(given["name"], given.get("entityName"))
        return {"result": {"project": project, "model": project, "inserted": True}}

    def _known(self, name: str | None, entity: str | None) -> dict[str, Any]:
        project = self._project(name, entity)
        return self.store["projects"].get(project["name"]) or self.store.put("projects", project["name"], project)

    # Runs.

    def on_UpsertBucket(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or secrets.token_hex(4)
        known, project = self.store["runs"].get(name), self._known(variables.get("project"), variables.get("entity"))
        run = known or {"id": name, "project": project["name"], "entity": project["entityName"], "state": "running"}
        run.setdefault("exit_code", None)
        for key in ("config", "summary"):
            run.setdefault(key, {})
        for key in ("history", "events", "files", "logged", "used"):
            run.setdefault(key, [])
        plain = {"displayName": "name", "groupName": "group", "jobType": "job_type", "tags": "tags", "notes": "notes"}
        plain |= {"commit": "commit", "program": "program", "host": "host", "sweep": "sweep", "state": "state"}
        run |= {ours: variables[theirs] for theirs, ours in plain.items() if variables.get(theirs) is not None}
        if variables.get("config"):
            wrapped = json.loads(variables["config"])
            run["config"] = {key: one.get("value", one) for key, one in wrapped.items()}
        if variables.get("summaryMetrics"):
            run["summary"] = json.loads(variables["summaryMetrics"])
        self.store.put("runs", name, run)
        for sweep in self.store["sweeps"].values():
            if name in sweep["runs"] or run.get("sweep") == sweep["id"]:
                run["sweep"] = sweep["id"]
                self.store.save("runs", name)
        bucket = {"id": _id("Run", name), "name": name, "displayName": run.get("name", name), "description": None}
        bucket |= {"config": json.dumps({key: {"value": value} for key, value in run["config"].items()})}
        bucket |= {"sweepName": run.get("sweep"), "project": project, "historyLineCount": len(run["history"])}
        return {"upsertBucket": {"bucket": bucket, "inserted": known is None}}

    def on_RunResumeStatus(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self.store["runs"].get(variables["name"])
        bucket = run and {
            "id": _id("Run", run["id"]),
            "name": run["id"],
            "displayName": run.get("name"),
            "summaryMetrics": json.dumps(run["summary"]),
            "config": json.dumps({key: {"value": value} for key, value in run["config"].items()}),
            "logLineCount": 0,
            "historyLineCount": len(run["history"]),
            "eventsLineCount": len(run["events"]),
            "historyTail": json.dumps([json.dumps(line) for line in run["history"][-1:]]),
            "eventsTail": json.dumps([json.dumps(line) for line in run["events"][-1:]]),
            "tags": run.get("tags", []),
            "notes": run.get("notes"),
            "wandbConfig": json.dumps({"t": {}}),
        }
        return {"model": {**self._project(variables.get("project"), variables.get("entity")), "bucket": bucket}}

    def on_QueryRunInfo(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self.store["runs"].get(variables["run"])
        shown = run and {"displayName": run.get("name"), "summaryMetrics": json.dumps(run["summary"])}
        shown = shown and {**shown, "id": _id("Run", variables["run"]), "state": run["state"]}
        return {"project": {"run": shown}}

    on_RunState = on_QueryRunInfo

    def on_CreateRunFiles(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        folder = f"runs/{variables['run']}"
        files = [{"name": name, "uploadUrl": self._url("upload", f"{folder}/{name}")} for name in variables["files"]]
        return {"createRunFiles": {"runID": _id("Run", variables["run"]), "uploadHeaders": [], "files": files}}

    def on_MarkRunFilesUploaded(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self.store["runs"][variables["run"]]
        run["files"] = sorted({*run["files"], *variables["files"]})
        self.store.save("runs", run["id"])
        return {"markRunFilesUploaded": {"success": True}}

    async def file_stream(self, request: web.Request) -> web.Response:
        self._authorize(request)
        run = self.store["runs"].get(request.match_info["run"])
        if run is None:
            raise web.HTTPNotFound(text="no such run")
        body = await request.json()
        for name, part in (body.get("files") or {}).items():
            if name in STREAMS:
                lines = run[STREAMS[name]]
                lines[part["offset"] :] = [json.loads(line) for line in part["content"]]
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        run["files"] = sorted({*run["files"], *(body.get("uploaded") or [])})
        if body.get("complete"):
            run |= {"exit_code": body["exitcode"], "state": "failed" if body["exitcode"] else "finished"}
        self.store.save("runs", run["id"])
        return web.json_response({"exitcode": None, "limits": {}})

    # Files.

    def _url(self, verb: str, path: str) -> str:
        return f"{self.origin}/{verb}/{path}"

    async def upload(self, request: web.Request) -> web.Response:
        self.store.write(request.match_info["path"], await request.read())
        return web.Response()

    async def download(self, request: web.Request) -> web.FileResponse:
        path = self.store.folder / request.match_info["path"]
        if ".." in path.parts or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)

    # Artifacts.

    def on_CreateArtifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        collection = given.get("artifactCollectionName") or (given.get("artifactCollectionNames") or [""])[0]
        same = [one for one in self.store["artifacts"].values() if one["name"] == collection]
        artifact = next((one for one in same if one["digest"] == given["digest"]), None)
        if artifact is None:
            artifact = {"id": secrets.token_hex(8), "name": collection, "type": given["artifactTypeName"]}
            artifact |= {"project": given["projectName"], "digest": given["digest"], "state": "PENDING"}
            artifact |= {"version": len(same), "created_by": given.get("runName"), "used_by": [], "files": {}}
            artifact |= {"metadata": json.loads(given.get("metadata") or "{}"), "manifest": None}
            artifact |= {"description": given.get("description"), "client_ids": [], "aliases": []}
        # A run that only uses what nobody has logged yet sends it too, and names no run as its maker.
        artifact["created_by"] = artifact["created_by"] or given.get("runName")
        artifact["client_ids"].append(given.get("clientID"))
        artifact["aliases"] = sorted({*artifact["aliases"], *(one["alias"] for one in given.get("aliases") or [])})
        for other in same:
            if other is not artifact:
                other["aliases"] = [alias for alias in other["aliases"] if alias not in artifact["aliases"]]
                self.store.save("artifacts", other["id"])
        self.store.put("artifacts", artifact["id"], artifact)
        self._link(given.get("runName"), "logged", artifact)
        latest = next((one["id"] for one in same if one["state"] == "COMMITTED"), None)
        sequence = {"id": _id("ArtifactSequence", collection), "latestArtifact": latest and {"id": latest}}
        shown = {"id": artifact["id"], "state": artifact["state"], "artifactSequence": sequence}
        return {"createArtifact": {"artifact": shown}}

    def _link(self, run_name: str | None, how: str, artifact: Mapping[str, Any]) -> None:
        run = self.store["runs"].get(run_name or "")
        if run is not None and artifact["name"] not in run[how]:
            run[how].append(artifact["name"])
            self.store.save("runs", run["id"])

    def on_CreateArtifactManifest(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        file_id = f"manifests/{variables['artifactID']}/{variables['name']}"
        file = {"id": file_id, "uploadUrl": self._url("upload", file_id), "uploadHeaders": []}
        shown = {"artifactManifest": {"id": variables["artifactID"], "file": file}}
        return {"createArtifactManifest": shown, "updateArtifactManifest": shown}

    def on_UpdateArtifactManifest(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = "wandb_manifest.json"
        return self.on_CreateArtifactManifest({"artifactID": variables["artifactManifestID"], "name": name})

    def on_CreateArtifactFiles(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        edges = []
        for one in variables["input"]["artifactFiles"]:
            path = f"artifacts/{one['artifactID']}/{one['name']}"
            file = {"storagePath": path, "uploadUrl": self._url("upload", path), "uploadHeaders": []}
            file |= {"uploadMultipartUrls": None, "artifact": {"id": one["artifactID"]}}
            edges.append({"node": file})
            self.store["artifacts"][one["artifactID"]]["files"][one["name"]] = one.get("md5")
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        artifact = self.store["artifacts"][variables["artifactID"]]
        if artifact["state"] == "COMMITTED":  # two runs sent it at once
            return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}
        manifest = self.store.folder / "manifests" / artifact["id"] / "wandb_manifest.json"
        if not manifest.is_file():
            raise web.HTTPBadRequest(text=f"{artifact['name']} has no manifest")
        artifact |= {"state": "COMMITTED", "manifest": json.loads(manifest.read_text())}
        missing = [
            name
            for name, entry in artifact["manifest"]["contents"].items()
            if "ref" not in entry and not (self.store.folder / "artifacts" / artifact["id"] / name).is_file()
        ]
        if missing:
            raise web.HTTPBadRequest(text=f"{artifact['name']} lacks its files {missing}")
        self.store.save("artifacts", artifact["id"])
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def on_UseArtifact(self, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        given = variables["input"]
        artifact = self.store["artifacts"].get(given["artifactID"])
        if artifact is None:
            return None
        run = given.get("runName") or variables.get("runName")
        artifact["used_by"] = sorted({*artifact["used_by"], run})
        self.store.save("artifacts", artifact["id"])
        self._link(run, "used", artifact)
        return {"useArtifact": {"artifact": {"id": artifact["id"], **self._artifact(artifact)}}}

    def on_ArtifactByID(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        artifact = self.store["artifacts"].get(variables["id"])
        return {"artifact": artifact and self._artifact(artifact)}

    def on_ClientIDMapping(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        found = [one["id"] for one in self.store["artifacts"].values() if variables["clientID"] in one["client_ids"]]
        return {"clientIDMapping": {"serverID": found[0]} if found else None}

    def on_ProjectArtifactCollection(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"project": {"artifactType": None}}

    def on_ArtifactType(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = str(variables.get("name")).partition(":")[0]
        types = [one["type"] for one in self.store["artifacts"].values() if one["name"] == name]
        return {"project": {"artifact": {"artifactType": {"name": types[0]}} if types else None}}

    def on_ArtifactMembershipByName(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name, _, alias = variables["name"].partition(":")
        found = [one for one in self.store["artifacts"].values() if one["name"] == name]
        chosen = [one for one in found if alias in (f"v{one['version']}", *one["aliases"])]
        membership = chosen and {
            "__typename": "ArtifactCollectionMembership",
            "id": _id("Membership", chosen[-1]["id"]),
            "versionIndex": chosen[-1]["version"],
            "createdAt": CREATED,
            "aliases": [],
            "artifactCollection": self._artifact(chosen[-1])["artifactSequence"],
            "artifact": self._artifact(chosen[-1]),
        }
        return {"project": {"artifactCollectionMembership": membership or None}}

    def _artifact(self, artifact: Mapping[str, Any]) -> dict[str, Any]:
        project = self._project(artifact["project"], ENTITY)
        sequence = {"__typename": "ArtifactSequence", "name": artifact["name"], "project": project}
        aliases = [
            {"__typename": "ArtifactAlias", "id": _id("Alias", alias), "alias": alias, "artifactCollection": sequence}
            for alias in artifact["aliases"]
        ]
        fields = {"__typename": "Artifact", "id": artifact["id"], "artifactSequence": sequence, "aliases": aliases}
        fields |= {"versionIndex": artifact["version"], "artifactType": {"name": artifact["type"]}, "tags": []}
        fields |= {"description": artifact["description"], "metadata": json.dumps(artifact["metadata"])}
        fields |= {"ttlDurationSeconds": -2, "ttlIsInherited": True, "historyStep": None, "state": artifact["state"]}
        fields |= {"size": 0, "digest": artifact["digest"], "digestAlgorithm": "MANIFEST_MD5", "commitHash": None}
        return {**fields, "fileCount": len(artifact["files"]), "createdAt": CREATED, "updatedAt": CREATED}

    # Sweeps and agents.

    def on_UpsertSweep(self, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        sweep = self.store["sweeps"].get(variables.get("id") or "")
        if variables.get("id") and sweep is None:
            return None
        if sweep is None:
            config = yaml.safe_load(variables["config"])
            project = self._known(variables.get("projectName"), variables.get("entityName"))
            sweep = {"id": secrets.token_hex(4), "config": config, "yaml": variables["config"], "runs": {}}
            sweep |= {"project": project["name"], "entity": project["entityName"], "state": "PENDING"}
        if variables.get("state"):
            sweep["state"] = variables["state"]
        self.store.put("sweeps", sweep["id"], sweep)
        shown = {"name": sweep["id"], "state": sweep["state"], "project": self._project(sweep["project"], ENTITY)}
        return {"upsertSweep": {"sweep": shown, "configValidationWarnings": []}}

    on_UpsertSweepState = on_UpsertSweep

    def on_SweepWithRuns(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        sweep = self.store["sweeps"].get(variables["sweep"])
        if sweep is None:
            return {"project": {"sweep": None}}
        nodes = []
        for name in sweep["runs"]:
            run = self.store["runs"].get(name, {"state": "pending", "summary": {}, "config": {}, "exit_code": None})
            node = {"name": name, "state": run["state"], "config": json.dumps(run["config"]), "sampledHistory": []}
            node |= {"summaryMetrics": json.dumps(run["summary"]), "exitcode": run["exit_code"], "heartbeatAt": CREATED}
            node |= {"shouldStop": False, "failed": False, "stopped": False, "running": run["state"] == "running"}
            nodes.append({"node": node})
        shown = {"id": sweep["id"], "name": sweep["id"], "method": sweep["config"]["method"], "state": sweep["state"]}
        shown |= {"description": None, "config": sweep["yaml"], "createdAt": CREATED, "heartbeatAt": None}
        shown |= {"updatedAt": CREATED, "earlyStopJobRunning": False, "bestLoss": None, "controller": None}
        shown |= {"scheduler": None, "runs": {"edges": nodes}, "displayName": None, "controllerRunName": None}
        return {"project": {"sweep": shown}}

    on_SweepConfig = on_GetSweepState = on_SweepWithRuns

    def on_CreateAgent(self, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        if variables["sweep"] not in self.store["sweeps"]:
            return None
        return {"createAgent": {"agent": {"id": _id("Agent", variables["sweep"], secrets.token_hex(4))}}}

    def on_Heartbeat(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """One run to an agent that has none; `exit` when the grid is given out."""
        _, sweep_id, _ = base64.urlsafe_b64decode(variables["id"]).decode().split(":")
        sweep, busy = self.store["sweeps"][sweep_id], bool(json.loads(variables.get("runState") or "{}"))
        commands: list[dict[str, Any]] = []
        if not busy and sweep["state"] in ("PENDING", "RUNNING"):
            commands = self._next(sweep)
        elif not busy:
            commands = [{"type": "exit"}]
        shown = {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}
        return {"agentHeartbeat": shown}

    def _next(self, sweep: dict[str, Any]) -> list[dict[str, Any]]:
        if sweep["config"]["method"] != "grid":
            raise web.HTTPBadRequest(text="this stand-in knows the method grid alone")
        parameters = sweep["config"]["parameters"]
        values = [one["values"] if "values" in one else [one["value"]] for one in parameters.values()]
        combinations = [dict(zip(parameters, chosen, strict=True)) for chosen in itertools.product(*values)]
        if len(sweep["runs"]) == len(combinations):
            sweep["state"] = "FINISHED"
            self.store.save("sweeps", sweep["id"])
            return [{"type": "exit"}]
        chosen, run_id = combinations[len(sweep["runs"])], secrets.token_hex(4)
        sweep["runs"][run_id], sweep["state"] = chosen, "RUNNING"
        self.store.save("sweeps", sweep["id"])
        given = {key: {"value": value} for key, value in chosen.items()}
        return [{"type": "run", "run_id": run_id, "program": sweep["config"].get("program"), "args": given}]

    # Workspaces and reports.

    def on_UpsertView(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        known = self.store["views"].get(variables.get("id") or "")
        view = known or {"id": secrets.token_hex(8)}
        names = {"name": "name", "displayName": "display_name", "type": "type", "description": "description"}
        view |= {ours: variables[theirs] for theirs, ours in names.items() if variables.get(theirs) is not None}
        if variables.get("spec"):
            view["spec"] = json.loads(variables["spec"])
        view.setdefault("project", self._known(variables.get("projectName"), variables.get("entityName"))["name"])
        self.store.put("views", view["id"], view)
        return {"upsertView": {"view": self._view(view), "inserted": known is None}}

    on_UpsertView2 = on_UpsertView

    def on_SpecificReport(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        view = self.store["views"].get(variables["reportId"])
        return {"view": view and self._view(view)}

    def on_View(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        wanted = variables.get("viewName")
        found = [view for view in self.store["views"].values() if wanted in (None, view.get("name"))]
        project = self._project(variables.get("name"), variables.get("entityName"))
        return {"project": {**project, "allViews": {"edges": [{"node": self._view(view)} for view in found]}}}

    def _view(self, view: Mapping[str, Any]) -> dict[str, Any]:
        fields = {"id": view["id"], "type": view.get("type"), "name": view.get("name", "")}
        fields |= {"displayName": view.get("display_name", ""), "description": view.get("description", "")}
        fields |= {"project": self._project(view["project"], ENTITY), "createdAt": CREATED, "updatedAt": CREATED}
        return {**fields, "spec": json.dumps(view.get("spec", {}))}


async def serve(port: int, server: Server) -> None:
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    assert site._server is not None
    print(json.dumps({"port": site._server.sockets[0].getsockname()[1]}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A local stand-in for a W&B server.")
    parser.add_argument("--folder", type=Path, required=True, help="where what it receives is written")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--key-required", help="refuse requests without this key; any of 40 letters will do otherwise")
    options = parser.parse_args()
    asyncio.run(serve(options.port, Server(Store(options.folder), options.key_required)))


if __name__ == "__main__":
    main()
