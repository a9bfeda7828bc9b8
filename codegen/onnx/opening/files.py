"""Open an ONNX file that nobody vouches for.

The bytes are walked before a parser gets them, paths of external data are checked before a library follows
them, and the graph is checked before it is made into objects: memory stays below 256 MiB and twice the file,
nothing in the file is run, nothing is written, and no file outside the model's folder is opened.  What is
refused is refused with one ``CheckpointError``.  Operators that nobody knows are no reason to refuse.
"""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnc.codegen.onnx.opening import wire
from attnc.codegen.onnx.opening.external import Folder
from attnc.codegen.onnx.opening.functions import RESERVED, STANDARD, check_functions, since
from attnc.codegen.onnx.opening.graphs import check_graph
from attnc.codegen.onnx.opening.payload import check_tensor
from attnc.codegen.onnx.opening.wire import quoted
from attnc.errors import CheckpointError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSETS = range(7, 27)
"""Versions of ai.onnx that can be read and that ONNX Runtime runs."""
IR_VERSIONS = range(3, 14)
KNOWN = (*RESERVED, "ai.onnx.ml")
"""Domains of operators that ONNX or ONNX Runtime defines."""
_LFS = b"version https://git-lfs"


def open_model(path: str | os.PathLike[str]) -> ir.Model:
    """Return the model in the ONNX file at ``path``; its external data stays on disk until it is asked for.

    Raises:
        CheckpointError: no such file, truncated, corrupt, lying about lengths or shapes, external data that
            is not a plain file inside the model's folder, a graph with a circle or out of order, a function
            that calls itself, an opset outside ``OPSETS``, an input without a shape, or too large for the
            memory that opening may take.
    """
    import onnx_ir.serde
    from google.protobuf.message import DecodeError

    place = Path(path)
    data = _read(place)
    with _about(place):
        wire.scan(data)
        proto = _parse(data, DecodeError)
        del data
        check_proto(proto, Folder(place.absolute().parent))
        with _quiet("onnx_ir"):
            try:
                model = onnx_ir.serde.deserialize_model(proto)
                _set_folder(model, place.absolute().parent)
            except (onnx_ir.serde.SerdeError, ValueError, TypeError, KeyError, NotImplementedError) as e:
                raise CheckpointError(f"expected a valid model; onnx_ir cannot read it: {_root(e)}") from None
    return model


def custom_operators(model: ir.Model) -> tuple[str, ...]:
    """Return the operators that nobody defines: no standard, no runtime, no function of the model.

    Each is written as domain.name.  They are left alone, for what they compute is not known.
    """
    version = model.opset_imports.get("", OPSETS[-1])
    found = set()
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in body.all_nodes():
            standard = node.domain in STANDARD
            known = node.domain in KNOWN and not (standard and since(node.op_type, version) is None)
            if not known and node.op_identifier() not in model.functions:
                found.add(f"{'ai.onnx' if standard else node.domain}.{node.op_type}")
    return tuple(sorted(found))


def check_proto(model: onnx.ModelProto, folder: Folder) -> None:
    """Check a parsed model, paths first.

    Raises:
        CheckpointError: as ``open_model``.
    """
    for tensor in tensors(model):
        nbytes = check_tensor(tensor)
        if tensor.data_location == tensor.EXTERNAL:
            folder.check(tensor, nbytes)
    _check_versions(model)
    if model.training_info:
        raise CheckpointError("expected a model for inference, found training_info; export it without")
    if not model.HasField("graph"):
        raise CheckpointError("expected a graph, found none")
    check_functions(model)
    check_graph(model.graph)
    _check_inputs(model.graph)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Give every tensor of a model: initializers, attributes, subgraphs, functions, sparse, training."""
    graphs = [model.graph]
    for info in model.training_info:
        graphs += [info.initialization, info.algorithm]
    pending = [a for f in model.functions for a in f.attribute_proto]
    pending += [a for f in model.functions for n in f.node for a in n.attribute]
    while graphs or pending:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from _dense(graph.sparse_initializer)
            pending += [a for n in graph.node for a in n.attribute]
            continue
        a = pending.pop()
        if a.HasField("t"):
            yield a.t
        yield from a.tensors
        yield from _dense((*((a.sparse_tensor,) if a.HasField("sparse_tensor") else ()), *a.sparse_tensors))
        graphs += [*((a.g,) if a.HasField("g") else ()), *a.graphs]


def _dense(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for x in sparse:
        for name in ("values", "indices"):
            if x.HasField(name):
                yield getattr(x, name)


def _read(path: Path) -> bytes:
    """Return the bytes of a plain file of less than 2 GiB."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise CheckpointError(f"opening {path}: expected an ONNX file, found none ({reason})") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no plain file"
            raise CheckpointError(f"opening {path}: expected an ONNX file, found {kind}")
        if found.st_size > wire.LARGEST:
            raise CheckpointError(
                f"reading {path}: expected at most 2 GiB, found {found.st_size:,} bytes; weights of a larger "
                "model belong into external data"
            )
        with open(fd, "rb", closefd=False) as f:
            data = f.read(found.st_size)
    finally:
        os.close(fd)
    if data.startswith(_LFS):
        raise CheckpointError(
            f"reading {path}: expected an ONNX model, found a pointer of Git LFS; git lfs pull"
        )
    if not data:
        raise CheckpointError(f"reading {path}: expected an ONNX model, found an empty file")
    return data


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Put the file's name before what is said about it."""
    try:
        yield
    except CheckpointError as e:
        raise CheckpointError(f"reading {path}: {e}") from None


def _parse(data: bytes, error: type[Exception]) -> onnx.ModelProto:
    import onnx

    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except error:
        raise CheckpointError("expected an ONNX model; protobuf cannot parse it") from None
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's warnings about the file to ourselves: they are no part of our report."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _root(e: BaseException) -> str:
    """Return the first cause of an error in one line."""
    while e.__cause__ is not None:
        e = e.__cause__
    return f"{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ''}"


def _check_versions(model: onnx.ModelProto) -> None:
    if model.ir_version not in IR_VERSIONS:
        raise CheckpointError(
            f"expected an IR version of {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}, found {model.ir_version}"
        )
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain in STANDARD else entry.domain
        if domain in versions:
            raise CheckpointError(f"expected one version of {domain or 'ai.onnx'}, found two")
        versions[domain] = entry.version
    found = versions.get("")
    if found is None:
        raise CheckpointError("expected an opset of ai.onnx, found none")
    for version, whose in [(found, ""), *_versions_inside(model)]:
        if version not in OPSETS:
            raise CheckpointError(
                f"{whose}expected an opset of ai.onnx from {OPSETS[0]} to {OPSETS[-1]}, found {version}; "
                "convert it with onnx.version_converter, or export at another opset"
            )


def _versions_inside(model: onnx.ModelProto) -> list[tuple[int, str]]:
    return [
        (i.version, f"function {quoted(f.name)}: ")
        for f in model.functions
        for i in f.opset_import
        if i.domain in STANDARD
    ]


def _check_inputs(graph: onnx.GraphProto) -> None:
    """Check that every input that has to be fed says its element type and its axes."""
    given = {t.name for t in graph.initializer}
    for info in graph.input:
        if info.name in given:
            continue
        kind = info.type.WhichOneof("value")
        if kind in ("sequence_type", "optional_type"):
            continue
        if kind != "tensor_type" or not info.type.tensor_type.elem_type:
            raise CheckpointError(f"input {quoted(info.name)}: expected an element type, found none")
        if not info.type.tensor_type.HasField("shape"):
            raise CheckpointError(
                f"input {quoted(info.name)}: it needs a size or a name for each axis, expected a shape, "
                "found none; set it in the exporter, or with onnx.tools.update_model_dims"
            )


def _set_folder(model: ir.Model, folder: Path) -> None:
    """Tell the tensors on disk where the model lies, so that they hold their own checks against it."""
    import onnx_ir.external_data

    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        onnx_ir.external_data.set_base_dir(graph, folder)
