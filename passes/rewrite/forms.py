"""Forms: ways to run a site that a user may allow, and how a user says so.

``forms`` is one form, a list, or a mapping from module-path patterns to either. A form is an object
(``SlidingWindow(window=256)``) or its text (``"sliding_window(window=256)"``). The longest matching pattern
rules a site. Bad values raise at once.
"""

from __future__ import annotations

import ast
import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

from attnc.errors import RewriteError, UnknownSiteError
from attnc.ir import AttentionSpec, Contract, Miss
from attnc.passes.rewrite.fuse.fused import Fused
from attnc.passes.rewrite.quant.w8a8 import W8A8
from attnc.passes.rewrite.sparse.chunked import Chunked
from attnc.passes.rewrite.sparse.neighborhood import Neighborhood
from attnc.passes.rewrite.sparse.power import PowerAttention
from attnc.passes.rewrite.sparse.s2 import S2
from attnc.passes.rewrite.sparse.sliding_window import SlidingWindow
from attnc.passes.rewrite.sparse.view_time import ViewTime


class Form(Protocol):
    """A way to run a site.

    Subclasses are frozen dataclasses whose fields are the options of their text form.
    """

    @property
    def name(self) -> str:
        """The name in kebab or snake case, as users write it."""
        ...

    @property
    def contract(self) -> Contract:
        """SAME function, or BOUNDED error that the user opted into."""
        ...

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Say why the form cannot serve this spec, None if it can."""
        ...

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec that runs in place of the found one."""
        ...


FORMS: dict[str, type[Any]] = {
    x.name: x for x in (Fused, Chunked, Neighborhood, PowerAttention, S2, SlidingWindow, ViewTime, W8A8)
}


@dataclass(frozen=True, slots=True)
class About:
    """What there is to know of a form: ``text`` says what it computes, what bounds the error, and the source.

    ``options`` are written as in its text form, a default after ``=``; ``summary`` is one line.
    """

    name: str
    contract: Contract
    options: tuple[str, ...]
    summary: str
    text: str


def about(name: str | None = None) -> tuple[About, ...]:
    """Return what there is to know of one form, or of all.

    Raises:
        RewriteError: there is no form of this name.
    """
    kinds = FORMS.values() if name is None else (_kind(name, "forms"),)
    return tuple(_about(k) for k in kinds)


def _about(kind: type[Any]) -> About:
    options = tuple(
        f.name if f.default is MISSING else f"{f.name}={_plain(f.default)!r}" for f in fields(kind)
    )
    own, whole = (
        inspect.cleandoc(x.__doc__ or "").replace("``", "") for x in (kind, inspect.getmodule(kind))
    )
    return About(kind.name, kind.contract, options, own.split("\n\n")[0].replace("\n", " "), whole)


def _plain(default: Any) -> Any:
    """Return a default as a user writes it: one value for all axes without its brackets."""
    return default[0] if isinstance(default, tuple) and len(default) == 1 else default


def _kind(name: str, where: str) -> type[Any]:
    kind = FORMS.get(name.replace("-", "_").lower())
    if kind is None:
        raise RewriteError(f"{where}: expected one of {', '.join(FORMS)}, found {name!r}")
    return kind


@dataclass(frozen=True, slots=True)
class Forms:
    """Which forms are allowed where: (pattern, forms) pairs."""

    rules: tuple[tuple[str, tuple[Any, ...]], ...]

    def at(self, module: str) -> tuple[Any, ...]:
        """Return the forms for a site in ``module``.

        They are those of the longest pattern that matches, none if none does.
        """
        matching = [(len(p), fs) for p, fs in self.rules if _matches(p, module)]
        return max(matching, key=lambda t: t[0])[1] if matching else ()

    def of(self, kind: type[Any]) -> tuple[Any, ...]:
        """Return all forms of one class, in order."""
        return tuple(f for _, fs in self.rules for f in fs if isinstance(f, kind))

    def check(self, modules: Sequence[str]) -> None:
        """Raise unless every pattern names some site.

        Raises:
            UnknownSiteError: a pattern matches none of ``modules``; the message lists those that exist.
        """
        for pattern, _ in self.rules:
            if pattern != "*" and not any(_matches(pattern, m) for m in modules):
                known = ", ".join(sorted(set(modules))) or "none: no attention was found"
                raise UnknownSiteError(
                    f"forms: expected a pattern that matches a site, found {pattern!r}; there are: {known}"
                )

    def to_plan(self) -> dict[str, list[dict[str, Any]]]:
        """Return the forms as plain data that ``parse_forms`` reads back."""
        return {
            p: [{"form": f.name, **{x.name: getattr(f, x.name) for x in fields(f)}} for f in fs]
            for p, fs in self.rules
        }


def _matches(pattern: str, module: str) -> bool:
    return (
        fnmatch.fnmatchcase(module, pattern)
        or module == pattern
        or module.startswith(pattern.rstrip("*").rstrip(".") + ".")
    )


def parse_forms(value: Any) -> Forms:
    """Return what a user wrote as ``Forms``.

    Raises:
        RewriteError: an unknown form name or option, or a bad value; the message says what was expected and
            found.
    """
    if isinstance(value, Forms):
        return value
    if isinstance(value, Mapping) and "form" not in value:
        rules = tuple((str(p), _several(v, str(p))) for p, v in value.items())
        if not rules:
            raise RewriteError("forms: expected at least one pattern, found an empty mapping")
        return Forms(rules)
    return Forms((("*", _several(value, "*")),))


def _several(value: Any, where: str) -> tuple[Any, ...]:
    """Read one form or a list of them; an empty list leaves the sites as they are."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    forms = tuple(_one(item, where) for item in items)
    names = [f.name for f in forms]
    if len(set(names)) < len(names):
        raise RewriteError(f"forms for {where!r}: expected each form once, found {names}")
    return (Fused(), *forms) if forms and all(isinstance(f, W8A8) for f in forms) else forms


def _one(item: Any, where: str) -> Any:
    if type(item) in FORMS.values():
        return item
    if isinstance(item, str):
        name, options = _parse_text(item, where)
    elif isinstance(item, Mapping) and isinstance(item.get("form"), str):
        name, options = item["form"], {k: v for k, v in item.items() if k != "form"}
    else:
        raise RewriteError(
            f"forms for {where!r}: expected a form, its text or a mapping with 'form', found {item!r}"
        )
    kind = _kind(name, f"forms for {where!r}")
    known = [f.name for f in fields(kind)]
    unknown = [k for k in options if k not in known]
    if unknown:
        raise RewriteError(f"forms for {where!r}: {name} has the options {known or 'none'}, found {unknown}")
    try:
        return kind(**options)
    except TypeError as e:
        raise RewriteError(f"forms for {where!r}: {name} needs other options: {e}") from None


def _parse_text(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """Read ``name`` or ``name(option=literal, ..)``; the name may be written with dashes."""
    name, bracket, options = text.strip().partition("(")
    try:
        tree: ast.expr | None = ast.parse(name.replace("-", "_") + bracket + options, mode="eval").body
    except (SyntaxError, ValueError):
        tree = None
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if (
        isinstance(tree, ast.Call)
        and isinstance(tree.func, ast.Name)
        and not tree.args
        and all(k.arg for k in tree.keywords)
    ):
        try:
            return tree.func.id, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
        except (ValueError, TypeError):
            pass
    example = "'fused' or 'sliding_window(window=256, sinks=4)'"
    raise RewriteError(f"forms for {where!r}: expected text such as {example}, found {text!r}")
