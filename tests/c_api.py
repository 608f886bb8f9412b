"""Runs a SavedModel through TensorFlow's C API, without importing tensorflow: our stand-in for TF Serving.

- `TF_LoadSessionFromSavedModel` with the tag `serve` is the C++ loader that TF Serving calls; the libraries come
  from the installed wheel by ctypes. Nothing of Python's TensorFlow, Keras or this project takes part.
- ScaNN's op library is loaded only where asked for: a bundle with an exact index has to work without it.

    echo '{"signature": "serving_default", "inputs": {"user_id": ["u1"]}}' | python tests/c_api.py [--no-scann] BUNDLE

reads one request a line and prints one JSON object of outputs for each; exits with one line on stderr, and 1, at the
first that fails. Not covered: TF Serving's own batching, warmup, version policy, REST and gRPC.
"""

import argparse
import ctypes
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

STRING, TSTRING_BYTES = 7, 24  # TF_STRING, sizeof(TF_TString)
NUMBERS: dict[int, Any] = {
    1: ctypes.c_float,
    2: ctypes.c_double,
    3: ctypes.c_int32,
    9: ctypes.c_int64,
    10: ctypes.c_bool,
}
DTYPES = {1: "float32", 2: "float64", 3: "int32", STRING: "string", 9: "int64", 10: "bool"}


class Buffer(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("length", c_size_t), ("deallocator", c_void_p)]


class Output(ctypes.Structure):
    _fields_ = [("operation", c_void_p), ("index", c_int)]


# What is called, with the result's type and the arguments'; ctypes would take a pointer for an int otherwise.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "TF_NewStatus": (c_void_p, []),
    "TF_DeleteStatus": (None, [c_void_p]),
    "TF_GetCode": (c_int, [c_void_p]),
    "TF_Message": (c_char_p, [c_void_p]),
    "TF_LoadLibrary": (c_void_p, [c_char_p, c_void_p]),
    "TF_NewGraph": (c_void_p, []),
    "TF_DeleteGraph": (None, [c_void_p]),
    "TF_NewSessionOptions": (c_void_p, []),
    "TF_DeleteSessionOptions": (None, [c_void_p]),
    "TF_NewBuffer": (POINTER(Buffer), []),
    "TF_DeleteBuffer": (None, [POINTER(Buffer)]),
    "TF_LoadSessionFromSavedModel": (
        c_void_p,
        [
            c_void_p,
            c_void_p,
            c_char_p,
            POINTER(c_char_p),
            c_int,
            c_void_p,
            POINTER(Buffer),
            c_void_p,
        ],
    ),
    "TF_CloseSession": (None, [c_void_p, c_void_p]),
    "TF_DeleteSession": (None, [c_void_p, c_void_p]),
    "TF_GraphOperationByName": (c_void_p, [c_void_p, c_char_p]),
    "TF_SessionRun": (
        None,
        [c_void_p, c_void_p]
        + [POINTER(Output), POINTER(c_void_p), c_int] * 2
        + [c_void_p, c_int, c_void_p, c_void_p],
    ),
    "TF_AllocateTensor": (c_void_p, [c_int, POINTER(c_int64), c_int, c_size_t]),
    "TF_DeleteTensor": (None, [c_void_p]),
    "TF_TensorData": (c_void_p, [c_void_p]),
    "TF_TensorType": (c_int, [c_void_p]),
    "TF_NumDims": (c_int, [c_void_p]),
    "TF_Dim": (c_int64, [c_void_p, c_int]),
    "TF_StringInit": (None, [c_void_p]),
    "TF_StringCopy": (None, [c_void_p, c_char_p, c_size_t]),
    "TF_StringDealloc": (None, [c_void_p]),
    "TF_StringGetDataPointer": (c_void_p, [c_void_p]),
    "TF_StringGetSize": (c_size_t, [c_void_p]),
}


def package(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def load_library() -> ctypes.CDLL:
    """TensorFlow's C API. The default dlopen mode, not RTLD_GLOBAL, keeps its symbols from clashing with others'."""
    folder = package("tensorflow")
    ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"))
    library = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


# ---------------------------------------------------------------------------------------------------------------------
# The signatures, from the protocol buffer's bytes: its Python classes live in the tensorflow package.


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int for a varint, bytes for anything with a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            at += size
            yield number, message[at - size : at]


def entries(message: bytes, number: int) -> Iterator[tuple[str, bytes]]:
    """The (key, value) pairs of the map in field `number`."""
    for found, value in fields(message):
        if found == number:
            entry = dict(fields(value))
            yield entry.get(1, b"").decode(), entry.get(2, b"")


def tensor_info(message: bytes) -> dict[str, Any]:
    """A TensorInfo: the tensor's name, its type and its shape with -1 for an unknown size (None: unknown rank)."""
    info = dict(fields(message))
    sizes = [
        dict(fields(value)).get(1, 0) for number, value in fields(info.get(3, b"")) if number == 2
    ]
    unknown = dict(fields(info.get(3, b""))).get(3, 0)
    shape = None if unknown else [size - 2**64 if size >= 2**63 else size for size in sizes]
    return {
        "name": info.get(1, b"").decode(),
        "dtype": DTYPES.get(info.get(2, 0), str(info.get(2))),
        "shape": shape,
    }


def read_signatures(meta_graph: bytes) -> dict[str, dict[str, dict[str, Any]]]:
    """{signature: {"inputs": {key: tensor_info}, "outputs": ..}} of a MetaGraphDef (its field 5)."""
    return {
        name: {
            side: {key: tensor_info(value) for key, value in entries(signature, number)}
            for side, number in (("inputs", 1), ("outputs", 2))
        }
        for name, signature in entries(meta_graph, 5)
        if name != "__saved_model_init_op"
    }


# ---------------------------------------------------------------------------------------------------------------------


class SavedModelSession:
    """A SavedModel, loaded and initialised as TF Serving does it.

    Raises RuntimeError with TensorFlow's message where loading or running fails, and ValueError where a request does
    not fit the signature.
    """

    def __init__(self, bundle: str | Path, scann: bool = True) -> None:
        self._library = library = load_library()
        self._status = library.TF_NewStatus()
        if scann:
            path = package("scann") / "scann_ops" / "cc" / "_scann_ops.so"
            library.TF_LoadLibrary(os.fsencode(path), self._status)
            self._check(f"cannot load {path}")
        self._graph = library.TF_NewGraph()
        options, meta_graph = library.TF_NewSessionOptions(), library.TF_NewBuffer()
        tags = (c_char_p * 1)(b"serve")
        self._session = library.TF_LoadSessionFromSavedModel(
            options, None, os.fsencode(bundle), tags, 1, self._graph, meta_graph, self._status
        )
        library.TF_DeleteSessionOptions(options)
        self._check(f"cannot load {bundle}")
        self._signatures = read_signatures(
            ctypes.string_at(meta_graph[0].data, meta_graph[0].length)
        )
        library.TF_DeleteBuffer(meta_graph)

    def signatures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{signature: {"inputs": {key: {"name", "dtype", "shape"}}, "outputs": ..}}, -1 for a size not known."""
        return self._signatures

    def run(self, signature: str, inputs: dict[str, list]) -> dict[str, list]:
        """Runs a signature on nested lists of strings or numbers; strings come back as str, float32 bit for bit."""
        if signature not in self._signatures:
            raise ValueError(
                f"there is no signature {signature!r}: the bundle has {sorted(self._signatures)}"
            )
        expected = self._signatures[signature]
        if set(inputs) != set(expected["inputs"]):
            missing = sorted(set(expected["inputs"]) - set(inputs))
            unknown = sorted(set(inputs) - set(expected["inputs"]))
            raise ValueError(
                f"signature {signature!r}: inputs missing: {missing}, not in the signature: {unknown}"
            )
        feeds: list[int] = []
        fetches = (c_void_p * len(expected["outputs"]))()
        try:
            for key, info in expected["inputs"].items():
                feeds.append(
                    self._tensor(inputs[key], info, f"signature {signature!r}, input {key!r}")
                )
            self._library.TF_SessionRun(
                self._session,
                None,
                self._endpoints(expected["inputs"]),
                (c_void_p * len(feeds))(*feeds),
                len(feeds),
                self._endpoints(expected["outputs"]),
                fetches,
                len(fetches),
                *(None, 0, None, self._status),
            )
            self._check(f"signature {signature!r} failed")
            return {
                key: self._list(tensor)
                for key, tensor in zip(expected["outputs"], fetches, strict=True)
            }
        finally:
            for tensor in feeds:
                self._free_strings(tensor)
            for tensor in filter(None, [*feeds, *fetches]):
                self._library.TF_DeleteTensor(tensor)

    def close(self) -> None:
        """Frees the session and all that it holds."""
        self._library.TF_CloseSession(self._session, self._status)
        self._library.TF_DeleteSession(self._session, self._status)
        self._library.TF_DeleteGraph(self._graph)
        self._library.TF_DeleteStatus(self._status)

    def _check(self, what: str) -> None:
        if self._library.TF_GetCode(self._status):
            raise RuntimeError(
                f"{what}: {self._library.TF_Message(self._status).decode(errors='replace')}"
            )

    def _endpoints(self, infos: dict[str, dict[str, Any]]) -> Any:
        """The graph's tensors, from names like `serving_default_user_id:0`."""
        endpoints = (Output * len(infos))()
        for endpoint, info in zip(endpoints, infos.values(), strict=True):
            operation, _, index = info["name"].partition(":")
            endpoint.operation = self._library.TF_GraphOperationByName(
                self._graph, operation.encode()
            )
            endpoint.index = int(index)
            if not endpoint.operation:
                raise RuntimeError(f"the graph has no operation {operation!r}")
        return endpoints

    def _shape(self, tensor: int) -> list[int]:
        return [
            self._library.TF_Dim(tensor, axis) for axis in range(self._library.TF_NumDims(tensor))
        ]

    def _strings(self, tensor: int) -> range:
        """The addresses of a string tensor's elements."""
        start = self._library.TF_TensorData(tensor) or 0  # none where there is no element
        return range(start, start + TSTRING_BYTES * math.prod(self._shape(tensor)), TSTRING_BYTES)

    def _tensor(self, value: list, info: dict[str, Any], where: str) -> int:
        """A new tensor; its shape is that of the nested lists."""
        shape: list[int] = []
        flat: list[Any] = [value]
        while flat and isinstance(flat[0], list):
            shape.append(len(flat[0]))
            if any(not isinstance(part, list) or len(part) != shape[-1] for part in flat):
                raise ValueError(f"{where}: the lists differ in length")
            flat = [element for part in flat for element in part]
        wanted = info["shape"]
        if wanted is not None:
            if not flat:  # [] is an empty batch of any rank
                shape += [max(size, 0) for size in wanted[len(shape) :]]
            if len(shape) != len(wanted) or any(
                w not in (-1, s) for s, w in zip(shape, wanted, strict=True)
            ):
                raise ValueError(f"{where}: the shape is {shape}, the signature wants {wanted}")
        dtype = next(number for number, name in DTYPES.items() if name == info["dtype"])
        accepted: tuple[type, ...] = (
            (str,) if dtype == STRING else (bool,) if dtype == 10 else (int, float)
        )
        if wrong := [element for element in flat if not isinstance(element, accepted)]:
            raise ValueError(f"{where}: {wrong[0]!r} is not of type {info['dtype']}")
        size = TSTRING_BYTES if dtype == STRING else ctypes.sizeof(NUMBERS[dtype])
        tensor = self._library.TF_AllocateTensor(
            dtype, (c_int64 * len(shape))(*shape), len(shape), size * len(flat)
        )
        if dtype == STRING:
            for address, element in zip(self._strings(tensor), flat, strict=True):
                encoded = element.encode()
                self._library.TF_StringInit(address)
                self._library.TF_StringCopy(address, encoded, len(encoded))
        elif flat:
            numbers = (NUMBERS[dtype] * len(flat))(*flat)
            ctypes.memmove(self._library.TF_TensorData(tensor), byref(numbers), size * len(flat))
        return tensor

    def _list(self, tensor: int) -> list:
        """A tensor's elements in lists as nested as its shape."""
        shape, dtype = self._shape(tensor), self._library.TF_TensorType(tensor)
        flat: list[Any]
        if dtype == STRING:
            get, size = self._library.TF_StringGetDataPointer, self._library.TF_StringGetSize
            flat = [
                ctypes.string_at(get(address), size(address)).decode()
                for address in self._strings(tensor)
            ]
        elif math.prod(shape):
            array = NUMBERS[dtype] * math.prod(shape)
            flat = list(array.from_address(self._library.TF_TensorData(tensor)))
        else:
            flat = []
        for depth, length in reversed(list(enumerate(shape))):
            flat = [flat[at * length : (at + 1) * length] for at in range(math.prod(shape[:depth]))]
        return flat[0]

    def _free_strings(self, tensor: int) -> None:
        """Long strings live outside their tensor. Those of an output belong to TensorFlow: it may be a constant."""
        if self._library.TF_TensorType(tensor) == STRING:
            for address in self._strings(tensor):
                self._library.TF_StringDealloc(address)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", help="the directory with saved_model.pb")
    parser.add_argument("--no-scann", action="store_true", help="do not load ScaNN's op library")
    arguments = parser.parse_args()
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # hides notices, keeps errors; read when the library loads
    try:
        session = SavedModelSession(arguments.bundle, scann=not arguments.no_scann)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(session.run(request["signature"], request["inputs"])), flush=True)
        session.close()
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    assert "tensorflow" not in sys.modules


if __name__ == "__main__":
    main()
