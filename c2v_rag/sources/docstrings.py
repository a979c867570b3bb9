"""Documents from the docstrings of Python's standard library. Run as a script, this file collects them."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from c2v_rag.sources.document import Document

PYTHON_DOCS = "python-docs"

# Not imported: importing some of these opens a browser, prints or starts a program; the others are tests or unused.
_NOT_IMPORTED = {"antigravity", "this", "idlelib", "turtledemo", "test", "tests", "lib2to3", "distutils", "__main__"}
# Modules that implement public modules: the public name is os.getpid, not posix.getpid.
_IMPLEMENTATIONS = {
    "posix",
    "nt",
    "posixpath",
    "ntpath",
    "genericpath",
    "sre_compile",
    "sre_constants",
    "sre_parse",
    "pydoc_data",
}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """Docstrings of this Python's standard library: one document for each module, class, function and method.

    The source is the dotted name. An object that several modules export appears once, under the shortest name that a
    module lists in `__all__` (asyncio.gather, not asyncio.tasks.gather).

    A separate process collects them: importing the whole library has side effects, and packages imported in this
    process may have changed it (some add methods to logging.Logger).
    """
    from c2v_rag.sources.document import Document  # imported here because the script cannot import this package

    command = [sys.executable, "-I", "-S", "-W", "ignore", __file__]
    collected = subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL).stdout
    return tuple(
        Document(text, name, {"kind": kind}, title=text.partition("\n")[0])
        for name, kind, text in json.loads(collected)
    )


def _collect_docs() -> list[tuple[str, str, str]]:
    """(dotted name, kind, passage) of every documented public object, sorted by name."""
    best: dict[int, tuple[tuple[bool, bool, bool, int, int, str], str, Any]] = {}
    for module in _standard_modules():
        for name, value, listed in _public_objects(module):
            # Of an object's names, the one with the lowest rank is used. An alias of a class (typing.Text is str) is
            # worse than a name that is not in `__all__`. An alias of a function in `__all__` (getpass.getpass is
            # unix_getpass) is better than such a name.
            renamed = not name.endswith(getattr(value, "__qualname__", ""))
            of_class = inspect.isclass(value) or "." in getattr(value, "__qualname__", "")
            rank = (renamed and of_class, not listed, renamed, name.count("."), len(name), name)
            if id(value) not in best or rank < best[id(value)][0]:
                best[id(value)] = (rank, name, value)
    passages = {}
    for _, full_name, value in best.values():
        name = full_name.removeprefix("builtins.")
        doc = inspect.cleandoc(value.__doc__)
        if len(doc.split()) >= 4:
            passages[name] = (name, _kind(value), f"{name}{_signature(value)}\n\n{doc}")
    return sorted(passages.values())


def _standard_modules() -> Iterator[ModuleType]:
    for name in sorted(sys.stdlib_module_names - _IMPLEMENTATIONS):
        if name.startswith("_") or name in _NOT_IMPORTED:
            continue
        yield from _module_and_submodules(name)


def _module_and_submodules(name: str) -> Iterator[ModuleType]:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, AttributeError):  # not built, or only for another operating system
        return
    yield module
    for submodule in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not submodule.name.startswith("_") and submodule.name not in _NOT_IMPORTED:
            yield from _module_and_submodules(f"{name}.{submodule.name}")


def _public_objects(module: ModuleType) -> Iterator[tuple[str, Any, bool]]:
    """(dotted name, object, whether `__all__` lists it) of every public object with a docstring."""
    if module.__doc__:
        yield module.__name__, module, True
    listed = set(getattr(module, "__all__", ()))
    # Some listed names are loaded on first use and are not in vars(module).
    lazy = {name: getattr(module, name, None) for name in listed - vars(module).keys()}
    for name, value in [*vars(module).items(), *lazy.items()]:
        if name.startswith("_") or not _has_docstring(value):
            continue
        defining_module = getattr(value, "__module__", None) or ""
        if (
            name not in listed
            and defining_module.lstrip("_") != module.__name__.lstrip("_")
            and defining_module not in _IMPLEMENTATIONS
        ):
            continue  # imported from another module
        yield f"{module.__name__}.{name}", value, name in listed
        if inspect.isclass(value):
            for member, raw in vars(value).items():
                inner = getattr(raw, "__func__", raw)
                if not member.startswith("_") and _has_docstring(inner):
                    yield f"{module.__name__}.{name}.{member}", inner, name in listed
    if module.__name__ == "os":
        for name in module.path.__all__:
            value = getattr(module.path, name)
            if _has_docstring(value):
                yield f"os.path.{name}", value, True


def _has_docstring(value: Any) -> bool:
    can_have_docstring = (
        inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, property | functools.cached_property)
    )
    return can_have_docstring and isinstance(getattr(value, "__doc__", None), str) and bool(value.__doc__.strip())


def _signature(value: Any) -> str:
    if not callable(value):
        return ""
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):  # some built-ins have none
        return ""
    # A default may be any object, such as the whole process environment: only short ones are shown.
    shown = [
        parameter
        if len(repr(parameter.default)) <= 30 and " at 0x" not in repr(parameter.default)
        else parameter.replace(default=...)
        for parameter in signature.parameters.values()
    ]
    return _ADDRESS.sub("", str(signature.replace(parameters=shown))).replace("Ellipsis", "...")


def _kind(value: Any) -> str:
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return "class"
    return "property" if isinstance(value, property | functools.cached_property) else "function"


if __name__ == "__main__":
    json.dump(_collect_docs(), sys.stdout)
