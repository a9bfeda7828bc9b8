"""Save an optimized model as a directory and load it again.

A transformers model becomes an ordinary checkpoint folder: its own config and tokenizer, safetensors, and
``attnc.json``, by which ``load`` makes the same rewrites again and checks that it found the same sites.  Any
other model is saved as its captured program.  Reading models that attnc did not write is in
``attnc.opening``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import nn
from torch.export import ExportedProgram

from attnc.errors import AttncError, CheckpointError
from attnc.examples import from_recipe, recipe
from attnc.files import check_apart, check_free, write_directory
from attnc.manifest import MANIFEST, Manifest, certificates, read_manifest, verify_files
from attnc.opening import (
    CONFIG,
    PICKLES,
    Opened,
    open_folder,
    open_model,
    quiet_transformers,
    transformers_class,
)
from attnc.program_file import LoadedProgram, load_program, save_program, signature_of
from attnc.report.report import Report, SiteRecord
from attnc.tensor_files import INDEX, SHARD_BYTES, read_checkpoint, stream_tensors, write_tensors

__all__ = ["Opened", "load", "open_model", "save", "verify_files"]

PROGRAM = "program.pt2"
WEIGHT_FILES = (".safetensors", *PICKLES, ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".tflite", ".data")
CODE_FILES = (".py", ".pyc", ".so", ".sh")
QUANTIZERS = ("w8a8",)


def save(
    fast: nn.Module, directory: str | Path, *, force: bool = False, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write an optimized model to ``directory`` as a whole or not at all, and return the path.

    ``force`` replaces what is there, once the new one is complete.  ``shard_bytes`` bounds one file of
    weights.

    Raises:
        CheckpointError: the path exists, cannot be written, is the model's own source, or nothing was
            captured to save.
    """
    from attnc.api import session

    path, state = Path(directory), session(fast)
    source: Opened | None = state.source
    if source is not None and source.path is not None:
        check_apart(path, source.path)
    check_free(path, force=force)
    hf = _transformers_class_of(fast) is not None
    manifest = _manifest("hf" if hf else "program", fast, state)
    with write_directory(path, force=force) as folder:
        if hf:
            _save_transformers(fast, folder, source, manifest, shard_bytes)
        else:
            manifest.signature = _save_program(fast, folder, state.programs)
        manifest.write(folder)
    return path


def load(directory: str | Path) -> nn.Module:
    """Load what ``save`` wrote: the original's signature and output type, rewritten as the manifest says.

    Raises:
        CheckpointError: not such a folder, a file that changed, or a rewrite that this version makes
            differently.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    verify_files(folder)
    if manifest.kind == "program":
        return _load_program(folder, manifest)
    model = _load_transformers(folder, manifest)
    return _rewrite_again(folder, manifest, model)


def example_inputs_of(manifest: Manifest) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build inputs like those a saved model was captured with: same shapes and dtypes, other values."""
    inputs = manifest.inputs
    return tuple(from_recipe(inputs["args"])), dict(from_recipe(inputs["kwargs"]))


def rewritten_forms(manifest: Manifest) -> Any:
    """Return the forms of the manifest's plan for the sites it says were rewritten, and for no others.

    Quantizers are left out: the weights they made are already in the file.

    Raises:
        CheckpointError: the plan names a form that this version does not have.
    """
    from attnc.api import parse_forms

    records = manifest.records()
    changed = [s.id for s in records if s.status == "rewritten"]
    # A pattern holds for the modules below it too, so a site below a rewritten one is named to be left alone.
    below = [
        s.id for s in records if s.id not in changed and s.id.startswith(tuple(f"{i}." for i in changed))
    ]
    try:
        plan = parse_forms({row["sites"]: row["forms"] for row in manifest.plan})
        rules = [(i, tuple(f for f in plan.at(i) if f.name not in QUANTIZERS)) for i in changed]
        return replace(plan, rules=(*rules, *((i, ()) for i in below)))
    except (AttncError, KeyError, TypeError) as e:
        raise CheckpointError(f"reading {MANIFEST}: expected a plan that attnc wrote: {e}") from e


def _manifest(kind: str, fast: nn.Module, state: Any) -> Manifest:
    report: Report = state.report
    config = getattr(fast, "config", None)
    return Manifest(
        kind="hf" if kind == "hf" else "program",
        model=type(fast).__name__,
        target=state.target,
        plan=[{"sites": glob, "forms": forms} for glob, forms in state.plan.items()],
        inputs={"args": recipe(tuple(state.args)), "kwargs": recipe(dict(state.kwargs))},
        layout="module" if state.quantized else "transformers",
        attn_implementation=getattr(config, "_attn_implementation", None) if kind == "hf" else None,
        fixed_sizes=state.dynamic_shapes is None,
        sites=certificates(report),
        linears=report.linears,
        checks=report.checks,
        warnings=list(report.warnings),
        quantized=sorted(state.quantized),
    )


def _transformers_class_of(model: nn.Module) -> Any:
    """Return the transformers class of the model, or None where it is a class of the user's own."""
    if "transformers" not in sys.modules:
        return None
    cls = transformers_class(type(model).__name__)
    return cls if cls is type(model) else None


def _save_transformers(
    fast: nn.Module, folder: Path, source: Opened | None, manifest: Manifest, shard_bytes: int
) -> None:
    if source is not None and source.kind == "hf" and source.path is not None:
        _copy_files(source.path, folder)
    else:
        _write_config(cast(Any, fast), folder)
    if manifest.quantized:
        _mark_quantized(folder / CONFIG, fast, manifest.quantized)
    state, manifest.tied = _stored_tensors(cast(Any, fast))
    if manifest.layout == "transformers":
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(cast(Any, fast), state)
    write_tensors(folder, state, shard_bytes)


def _copy_files(source: Path, folder: Path) -> None:
    """Copy config, tokenizer and the like; no weights, no code, nothing hidden, no earlier manifest."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if (
            hidden
            or not path.is_file()
            or path.suffix in (*WEIGHT_FILES, *CODE_FILES)
            or name.name in (INDEX, MANIFEST)
        ):
            continue
        (folder / name.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def _write_config(fast: Any, folder: Path) -> None:
    """Write the config of a model that was not opened from a folder."""
    import copy

    config = copy.deepcopy(fast.config)
    config.architectures = [type(fast).__name__]
    config.save_pretrained(folder)
    if fast.can_generate() and fast.generation_config is not None:
        fast.generation_config.save_pretrained(folder)


def _mark_quantized(config: Path, model: nn.Module, quantized: Sequence[str]) -> None:
    """Name the int8 layers in config.json, in the words of compressed-tensors.

    Without it other programs would read the integers as if they were the weights.
    """
    values = json.loads(config.read_text(encoding="utf-8"))
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    ignored = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in set(quantized)
    ]
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        "ignore": sorted(ignored),
    }
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stored_tensors(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors to write, each storage once, and the aliases with the name they are stored under."""
    aliases = dict(getattr(model, "all_tied_weights_keys", None) or {})
    skipped = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    whole = model.state_dict()
    for name in sorted(whole, key=lambda n: n in aliases):
        tensor = whole[name]
        same = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))
        if tensor.numel() and first.setdefault(same, name) != name:
            tied[name] = first[same]
        elif name not in skipped:
            state[name] = tensor
    return {name: state[name] for name in whole if name in state}, dict(sorted(tied.items()))


def _save_program(fast: nn.Module, folder: Path, programs: Sequence[ExportedProgram]) -> list[dict[str, Any]]:
    """Write the first program; return the signature of the forward it stands for."""
    if not programs:
        raise CheckpointError(
            "saving: expected a model captured ahead of time, found none; "
            "call attnc.optimize(model, args, kwargs) with example inputs"
        )
    with open(folder / PROGRAM, "xb") as f:
        save_program(programs[0], cast(BinaryIO, f))
    return signature_of(fast, programs[0])


def _load_program(folder: Path, manifest: Manifest) -> nn.Module:
    model = LoadedProgram(load_program(folder / PROGRAM), manifest.signature, manifest.model)
    model.__dict__["report"] = report_of(manifest)
    return model


def _load_transformers(folder: Path, manifest: Manifest) -> nn.Module:
    """Build the transformers class and give it its weights."""
    if manifest.layout == "transformers":
        return cast(nn.Module, open_folder(folder, manifest.attn_implementation).model)
    from attnc.codegen.int8 import prepare_modules

    cls = _class_of(folder, manifest)
    with quiet_transformers():
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        config._attn_implementation = manifest.attn_implementation
        model: nn.Module = cls(config)
        model.to(_float_dtype(folder))
    prepare_modules(model, manifest.quantized)
    _fill(model, folder, manifest.tied)
    return model.eval()


def _class_of(folder: Path, manifest: Manifest) -> Any:
    cls = transformers_class(manifest.model)
    if cls is None:
        raise CheckpointError(f"loading {folder}: the installed transformers has no class {manifest.model}")
    return cls


def _float_dtype(folder: Path) -> torch.dtype:
    """Return the floating dtype of the weights that stayed floats."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    entries = read_checkpoint(folder)
    count = Counter(
        e.dtype for name, e in entries.items() if e.dtype in kinds and not name.endswith("_scale")
    )
    return kinds[count.most_common(1)[0][0]] if count else torch.float32


def _fill(model: nn.Module, folder: Path, tied: Mapping[str, str]) -> None:
    """Copy the stored tensors into the model, one at a time; every tensor of the model must be met."""
    wanted = model.state_dict()
    entries = read_checkpoint(folder)
    for name, tensor in stream_tensors(entries):
        place = wanted.pop(name, None)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            expected = "no such tensor" if place is None else f"{place.dtype} {list(place.shape)}"
            raise CheckpointError(
                f"reading {entries[name].file}: tensor {name!r}: expected {expected}, found {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        with torch.no_grad():
            place.copy_(tensor)
    missing = sorted(name for name in wanted if name not in tied)
    if missing:
        raise CheckpointError(f"reading {folder}: expected the tensor {missing[0]!r}, found none")


def _rewrite_again(folder: Path, manifest: Manifest, model: nn.Module) -> nn.Module:
    """Make the rewrites that the manifest lists, and check that they are the same ones."""
    from attnc.api import optimize, session

    wanted = [s for s in manifest.records() if s.status == "rewritten"]
    args, kwargs = example_inputs_of(manifest)
    forms = rewritten_forms(manifest)
    try:
        fast: nn.Module = optimize(
            model,
            args,
            kwargs,
            dynamic_shapes=None if manifest.fixed_sizes else "auto",
            forms=forms,
            target=manifest.target,
            verify=False,
            cost_model=False,
        )
    except AttncError as e:
        raise CheckpointError(f"loading {folder}: the rewrites could not be made again: {e}") from e
    report = cast(Report, fast.report)
    saved, found = (Counter(map(_identity, sites)) for sites in (wanted, _rewritten(report)))
    lost, more = saved - found, found - saved
    for problem, sites in (("was not found", lost), ("is new", more)):
        if sites:
            where, spec = next(iter(sites))
            raise CheckpointError(
                f"loading {folder}: expected the {len(wanted)} sites of {MANIFEST}, found a difference: "
                f"{where} ({spec}) {problem}; it was saved by {_versions(manifest)}"
            )
    _restore(report, manifest)
    state = session(fast)
    state.source = Opened(model, args, kwargs, "hf", getattr(model, "config", None), path=folder)
    state.quantized = tuple(manifest.quantized)
    return fast


def _rewritten(report: Report) -> Iterator[SiteRecord]:
    return (s for s in report.sites if s.status == "rewritten")


def _identity(site: SiteRecord) -> tuple[str, str]:
    """Return what makes two sites the same: id, and spec without sizes, whose symbols vary."""
    return site.id, re.sub(r"\[[^\]]*\]", "", site.spec)


def _restore(report: Report, manifest: Manifest) -> None:
    """Put the certificates measured at saving into the report of a loaded model."""
    saved: dict[tuple[str, str], list[SiteRecord]] = {}
    for record in manifest.records():
        saved.setdefault(_identity(record), []).append(record)
    for site in _rewritten(report):
        twin = saved[_identity(site)].pop(0)
        site.error, site.tolerance, site.predicted_gain = twin.error, twin.tolerance, twin.predicted_gain
    report.linears, report.checks = manifest.linears, manifest.checks


def report_of(manifest: Manifest) -> Report:
    return Report(
        manifest.versions.get("attnc", "?"),
        manifest.model,
        manifest.target,
        manifest.records(),
        [],
        manifest.warnings,
        manifest.linears,
        manifest.checks,
    )


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
