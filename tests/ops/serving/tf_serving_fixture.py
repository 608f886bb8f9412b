"""A stand-in for tensorflow_model_server's REST port, as far as rec/ops/serving/tf_serving.py and the README use it.

    python tests/ops/serving/tf_serving_fixture.py [--no-scann] retrieval=savedmodels/retrieval/3 ranking=...

prints the port that it listens on, on the loopback address, and serves until it is ended. Written from TensorFlow's
description (tensorflow.org/tfx/serving/api_rest) and the source of TF Serving's json_tensor.cc; the bundles run through
TensorFlow's C API (tests/c_api.py), without Python's TensorFlow.

    GET  /v1/models/NAME[/versions/V]            {"model_version_status": [{"version": "3", "state": "AVAILABLE", ..}]}
    POST /v1/models/NAME[/versions/V]:predict    {"signature_name"?, "inputs": {name: tensor} or the only tensor}
                                                 -> {"outputs": {name: tensor}, or the only tensor without its name}
                                                 {"signature_name"?, "instances": [{name: value} or the only value]}
                                                 -> {"predictions": [{name: value}, or the only value]}
    errors                                       400 or 404 and {"error": "..."}

Not covered: /metadata, :classify, :regress, labels, base64, gRPC, batching, loading and unloading.
"""

import argparse
import json
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent.parent))
from tests.c_api import SavedModelSession  # noqa: E402

PATH = re.compile(r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<version>\d+))?(?P<verb>:predict)?")


class RefusedError(Exception):
    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


class Model:
    def __init__(self, bundle: Path, scann: bool) -> None:
        self.version, self._session, self._lock = (
            bundle.resolve().name,
            SavedModelSession(bundle, scann),
            Lock(),
        )
        self._warm_up(
            {
                "user_id": "",
                "history": [""],
                "item_id": [""],
                "is_given": True,
                "exclude": [""],
                "exclude_seen": True,
            }
        )

    def _warm_up(self, examples: dict[str, Any]) -> None:
        """One small request a signature, as TF Serving makes those that a bundle brings along."""
        for name, signature in self._session.signatures().items():
            inputs = {}
            for key, info in signature["inputs"].items():
                listed = isinstance(examples[key], list) and len(info["shape"]) == 1
                inputs[key] = [examples[key][0] if listed else examples[key]]
            self._session.run(name, inputs)

    def predict(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request.get("signature_name") or "serving_default"
        signature = self._session.signatures().get(name)
        if signature is None:
            raise RefusedError(400, f"Failed to get input map for signature: {name}")
        if ("inputs" in request) == ("instances" in request):
            raise RefusedError(400, "JSON Value: must have exactly one of 'inputs' and 'instances'")
        by_row = "instances" in request
        inputs = self._rows(request["instances"], signature) if by_row else request["inputs"]
        if not isinstance(inputs, dict):
            if len(signature["inputs"]) > 1:
                raise RefusedError(400, "inputs is a plain value/list, but expecting an object")
            inputs = {key: inputs for key in signature["inputs"]}
        if missing := signature["inputs"].keys() - inputs.keys():
            raise RefusedError(400, f"Missing named input: {min(missing)} in 'inputs' object.")
        try:
            with self._lock:
                outputs = self._session.run(name, {key: inputs[key] for key in signature["inputs"]})
        except (ValueError, RuntimeError) as error:
            raise RefusedError(400, str(error)) from error
        if by_row:
            rows = [
                dict(zip(outputs, values, strict=True))
                for values in zip(*outputs.values(), strict=True)
            ]
            return {"predictions": [*outputs.values()][0] if len(outputs) == 1 else rows}
        return {"outputs": [*outputs.values()][0] if len(outputs) == 1 else outputs}

    def _rows(self, instances: Any, signature: dict[str, Any]) -> Any:
        """Row format -> columns."""
        if not isinstance(instances, list) or not instances:
            raise RefusedError(400, "No values in 'instances' array")
        if not isinstance(instances[0], dict):
            return instances
        if any(row.keys() != signature["inputs"].keys() for row in instances):
            raise RefusedError(
                400, f"JSON object: keys must be equal to: {','.join(sorted(signature['inputs']))}"
            )
        return {key: [row[key] for row in instances] for key in signature["inputs"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a call otherwise
    models: dict[str, Model] = {}

    def do_GET(self) -> None:  # noqa: N802
        self._answer("GET")

    def do_POST(self) -> None:  # noqa: N802
        self._answer("POST")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, content = 200, self._content(method, body)
        except RefusedError as error:
            status, content = error.status, {"error": str(error)}
        data = json.dumps(content, indent=4, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _content(self, method: str, body: bytes) -> dict[str, Any]:
        at = PATH.fullmatch(self.path)
        if at is None or bool(at["verb"]) != (method == "POST"):
            raise RefusedError(
                400 if method == "POST" else 404, f"Malformed request: {method} {self.path}"
            )
        model = self.models.get(at["name"])
        if model is None or at["version"] not in (None, model.version):
            wanted = (
                f"Latest({at['name']})"
                if at["version"] is None
                else f"Specific({at['name']}, {at['version']})"
            )
            raise RefusedError(404, f"Servable not found for request: {wanted}")
        if method == "GET":
            fine = {"error_code": "OK", "error_message": ""}
            return {
                "model_version_status": [
                    {"version": model.version, "state": "AVAILABLE", "status": fine}
                ]
            }
        try:
            request = json.loads(body)
        except ValueError as error:
            raise RefusedError(400, f"JSON Parse error: {error}") from error
        if not isinstance(request, dict):
            raise RefusedError(400, "JSON Value: Is not object")
        return model.predict(request)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--no-scann", action="store_true", help="do not load ScaNN's op library")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for each in arguments.models:
        name, _, bundle = each.partition("=")
        Handler.models[name] = Model(Path(bundle), scann=not arguments.no_scann)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
