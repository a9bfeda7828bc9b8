"""Open a model argument: a Hugging Face folder, a ``.pt2``, or ``file.py:callable``.

Nothing inside a checkpoint is ever run: weights come from safetensors whose headers were checked, classes
from the installed transformers, and a ``.pt2`` is opened with unpickling switched off.  Only Python code that
the user names by its path runs.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from attnc.errors import AttncError, CheckpointError
from attnc.examples import Sizes, example_inputs
from attnc.tensor_files import INDEX, WEIGHTS, Entry, read_checkpoint, read_json

Kind = Literal["hf", "pt2", "py"]

CONFIG = "config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = (
    "pickles can run code when they are opened, so attnc refuses them; where you trust it, convert it to "
    "safetensors: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors'), or for a "
    "Hugging Face folder "
    "Model.from_pretrained(DIR, use_safetensors=False).save_pretrained(OUT)"
)


@dataclass(slots=True)
class Opened:
    """A model with example inputs, and where it came from.

    ``model`` is an ``nn.Module``, or an ``ExportedProgram`` for a ``.pt2``.  ``config`` is the transformers
    config or None. ``tokenizer_dir`` is the folder of a tokenizer or None.  ``dynamic`` is the
    ``dynamic_shapes`` to capture with.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: Kind
    config: Any = None
    tokenizer_dir: Path | None = None
    dynamic: Any = "auto"
    path: Path | None = None
    warnings: list[str] = field(default_factory=list)


def open_model(
    path: str | Path, attn_implementation: str | None = None, *, sizes: Sizes | None = None
) -> Opened:
    """Open a model argument and make example inputs for it.

    ``attn_implementation`` ("eager", "sdpa") overrides what the config says, for a Hugging Face folder only.

    Raises:
        CheckpointError: there is no such thing, it is refused, or it is broken; the message names the file
            and the tensor.
    """
    text = str(path)
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py"):
        return _open_python(Path(file), name)
    place = Path(text)
    if place.is_dir():
        return open_folder(place, attn_implementation, sizes=sizes)
    if not place.exists():
        raise CheckpointError(
            f"opening {text}: expected a folder, a .pt2 or file.py:callable, found nothing at that path"
        )
    if place.suffix == ".pt2":
        from attnc.program_file import open_program

        return open_program(place)
    if place.suffix in PICKLES:
        raise CheckpointError(f"opening {text}: {CONVERT}")
    hint = "; name the callable that builds the model, as in file.py:build" if place.suffix == ".py" else ""
    raise CheckpointError(
        f"opening {text}: expected a folder, a .pt2 or file.py:callable, found a {place.suffix or 'plain'} "
        f"file{hint}"
    )


def open_folder(
    folder: Path, attn_implementation: str | None = None, *, sizes: Sizes | None = None
) -> Opened:
    """Open a Hugging Face folder.

    Raises:
        CheckpointError: as for ``open_model``.
    """
    cls, raw = model_class(folder)
    entries = checked_weights(folder)
    model = _from_pretrained(cls, folder, entries, attn_implementation)
    notes = []
    if "auto_map" in raw:
        notes.append(
            f"{folder / CONFIG}: auto_map names code inside the checkpoint; it was ignored, {cls.__name__} "
            "is transformers' own"
        )
    tokenizer = folder if any((folder / name).is_file() for name in TOKENIZER) else None
    kwargs = example_inputs(model, sizes)
    return Opened(model, (), kwargs, "hf", model.config, tokenizer, path=folder, warnings=notes)


def model_class(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the transformers class that ``config.json`` names, and the file's content.

    Raises:
        CheckpointError: no config, no architecture in it, or one that the installed transformers does not
            have.
    """
    if not (folder / CONFIG).is_file():
        below = sorted(
            str(p.parent.relative_to(folder))
            for p in folder.glob(f"*/{CONFIG}")
            if (p.parent / WEIGHTS).is_file()
        )
        hint = f"; a model lies below it: {folder / below[0]}" if below else ""
        raise CheckpointError(f"opening {folder}: expected a {CONFIG} in it, found none{hint}")
    raw = read_json(folder / CONFIG)
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"reading {folder / CONFIG}: expected architectures to name a transformers class, found {names!r}"
        )
    cls = transformers_class(names[0])
    if cls is None:
        why = (
            "auto_map asks for code that came inside the checkpoint, which attnc never runs; build the "
            "model in a file of "
            "your own and pass file.py:callable"
            if "auto_map" in raw
            else "the installed transformers has no such model class"
        )
        raise CheckpointError(f"reading {folder / CONFIG}: architecture {names[0]}: {why}")
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"reading {folder / CONFIG}: expected weights that are not quantized, found a quantization_config"
        )
    return cls, raw


def transformers_class(name: str) -> Any:
    """Return the model class of that name from the installed transformers, or None.

    Raises:
        CheckpointError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise CheckpointError("a Hugging Face folder needs transformers: pip install 'attnc[hf]'") from None
    cls = getattr(transformers, name, None)
    return cls if inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel) else None


def checked_weights(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a folder's safetensors after checking every header.

    Raises:
        CheckpointError: none there, only pickles, or a broken file.
    """
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise CheckpointError(f"opening {folder}: expected safetensors, found {pickles[0]}; {CONVERT}")
        raise CheckpointError(f"opening {folder}: expected weights in {WEIGHTS} or {INDEX}, found neither")
    return read_checkpoint(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports, which ours replace, for a block."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _from_pretrained(cls: Any, folder: Path, entries: Mapping[str, Entry], attn: str | None) -> nn.Module:
    """Build the class from its config and stream the weights in; a missing or odd tensor is an error."""
    asked = {} if attn is None else {"attn_implementation": attn}
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **asked,
            )
    except Exception as e:  # whatever the class or the config raises: it is the user's, and it is named
        raise CheckpointError(
            f"opening {folder}: {cls.__name__} could not be built: {type(e).__name__}: {first_line(e)}"
        ) from e
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        file = entries[name].file if name in entries else folder
        raise CheckpointError(
            f"reading {file}: tensor {name!r}: {cls.__name__} expects shape {list(expected)}, found "
            f"{list(found)}{_more(mismatched)}"
        )
    if missing:
        where = folder / (INDEX if (folder / INDEX).is_file() else WEIGHTS)
        raise CheckpointError(
            f"reading {where}: expected the tensor {missing[0]!r} for {cls.__name__}, found "
            f"none{_more(missing)}"
        )
    return model.eval()  # type: ignore[no-any-return]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says anything, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _more(items: list[Any]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def _open_python(file: Path, name: str) -> Opened:
    """Run ``name()`` of a file the user named; weights drawn there are the same at each call."""
    build = _load_callable(file, name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = build()
    except AttncError:
        raise
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        raise CheckpointError(
            f"{file}:{name} raised {type(e).__name__}: {first_line(e)} (at "
            f"{os.path.basename(where.filename)}:{where.lineno})"
        ) from e
    model, args, kwargs = _unpack(f"{file}:{name}", made)
    if not args and not kwargs:
        args, kwargs = _missing_inputs(f"{file}:{name}", model)
    return Opened(model, args, kwargs, "py", getattr(model, "config", None), path=file)


def _load_callable(file: Path, name: str) -> Callable[[], Any]:
    if not file.is_file():
        raise CheckpointError(f"opening {file}:{name}: expected a Python file, found nothing at {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, "a .py file always has a spec"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    shadowed = sys.modules.get(file.stem)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        sys.modules.setdefault(file.stem, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        line = getattr(e, "lineno", None) or where.lineno
        raise CheckpointError(
            f"opening {file}: it raised {type(e).__name__}: {first_line(e)} (line {line})"
        ) from e
    finally:
        sys.path.pop(0)
        if shadowed is None and not hasattr(module, name):
            sys.modules.pop(file.stem, None)
    found = getattr(module, name, None)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        there = sorted(
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == file.stem
        )
        raise CheckpointError(
            f"opening {file}: expected a callable {name!r}, found {', '.join(there) or 'no callables'}"
        )
    return found  # type: ignore[no-any-return]


def _unpack(where: str, made: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    parts = made if isinstance(made, tuple) else (made,)
    model, args, kwargs = (*parts, *((), {})[len(parts) - 1 :]) if 1 <= len(parts) <= 3 else (None, (), {})
    if isinstance(args, torch.Tensor):
        args = (args,)
    if (
        not isinstance(model, nn.Module)
        or not isinstance(args, (tuple, list))
        or not isinstance(kwargs, Mapping)
    ):
        found = ", ".join(type(p).__name__ for p in parts)
        raise CheckpointError(
            f"{where}: expected it to return module, (module, args) or (module, args, kwargs), found "
            f"({found})"
        )
    return model.eval(), tuple(args), dict(kwargs)


def _missing_inputs(where: str, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make inputs for a transformers model, none for a forward that needs none; ask for them otherwise."""
    if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel):
        return (), example_inputs(model)
    needed = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise CheckpointError(
            f"{where}: forward needs {', '.join(needed)}; return (module, args) or (module, args, kwargs)"
        )
    return (), {}
