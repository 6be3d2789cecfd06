"""Puts our functions and classes in the place of a peer's, wherever the peer has them, and back.

A peer is a module of this package with PEER (its name on PyPI), TESTED (the version that parity is tested with) and
`replacements()`: dotted name -> our object. The last part of a dotted name is an attribute of a module or a class, or a
key of a dictionary, which is how registries are kept.

`from peer.utils import f` leaves a second name for f in the importing module, so a name is not replaced alone: every
module of the peer that is loaded is searched for the same object, and the dictionaries in it; and those of the other
peers as well, which import from one another (TRL from Liger, verl and OpenRLHF from flash-attn).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, NamedTuple

from rlhf_fast import integrations

_ABSENT = object()  # in the place of the original: the name is ours alone, as a new entry of a registry is


class _Swap(NamedTuple):
    """One object of the peer's and ours, at the place that `replacements()` names."""

    name: str  # dotted
    owner: Any  # module, class or dictionary
    key: str
    theirs: Any
    ours: Any


class Peer(NamedTuple):
    """A library that can be patched, for `rlhf_fast doctor`."""

    name: str  # what patch() takes
    distribution: str
    tested: str
    installed: str | None  # version
    replaced: list[str]  # dotted names, [] where it is not patched


_active: dict[str, list[_Swap]] = {}
_replaced: dict[str, list[str]] = {}


def patch(peer: str) -> list[str]:
    """Replace the peer's functions by ours in this process; returns every dotted name that was replaced, sorted.

    Modules that import from the peer later get ours as well, and so have those of all peers that did so before. Names
    that the caller's own modules imported before the call keep the peer's objects. Patching twice changes nothing and
    returns the same names.
    Raises ValueError for a peer that we do not know, ModuleNotFoundError where it is not installed, AttributeError
    where it lacks a name. Warns where its version is not the one that is tested.
    """
    module = _integration(peer)
    name = _name(module)
    if name not in _active:
        _check_version(module)
        with _told_what_is_missing(module):
            swaps = [_found(dotted, ours) for dotted, ours in module.replacements().items()]
        pairs = {(id(s.ours), id(s.theirs)) for s in swaps if s.theirs is not _ABSENT}
        if len({ours for ours, _ in pairs}) < len(pairs):
            raise ValueError(f"{module.__name__}: one object replaces two, unpatch could not tell them apart")
        _active[name] = swaps
        _replaced[name] = sorted({s.name for s in swaps} | _exchange(swaps, to_ours=True))
    return list(_replaced[name])


def unpatch(peer: str) -> list[str]:
    """Give the peer its own objects back, also in modules imported since; returns the dotted names, [] if unpatched."""
    name = _name(_integration(peer))
    _exchange(_active.pop(name, []), to_ours=False)
    return _replaced.pop(name, [])


@contextmanager
def patched(peer: str) -> Iterator[list[str]]:
    """`patch(peer)` inside the block, as it was before outside: a peer that was patched already stays patched."""
    was_active = _name(_integration(peer)) in _active
    names = patch(peer)
    try:
        yield names
    finally:
        if not was_active:
            unpatch(peer)


def peers() -> list[Peer]:
    """Every library that can be patched, with what is installed and what is replaced in this process."""
    libraries = []
    for name in _known():
        module = _integration(name)
        libraries.append(Peer(name, module.PEER, module.TESTED, _installed(module), list(_replaced.get(name, []))))
    return libraries


def _known() -> list[str]:
    return sorted(info.name for info in iter_modules(integrations.__path__) if not info.name.startswith("_"))


def _integration(peer: str) -> ModuleType:
    name = peer.replace("-", "_")
    if name not in _known():
        raise ValueError(f"no integration for {peer!r}; there is one for {', '.join(_known())}")
    return import_module(f"{integrations.__name__}.{name}")


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _roots() -> list[str]:
    """The import names of all peers."""
    return [_integration(name).PEER.replace("-", "_") for name in _known()]


def _installed(module: ModuleType) -> str | None:
    try:
        return metadata.version(module.PEER)
    except metadata.PackageNotFoundError:
        return None


def _check_version(module: ModuleType) -> None:
    version = _installed(module)
    if version is None:
        raise ModuleNotFoundError(f"{module.PEER} is not installed: pip install {module.PEER}=={module.TESTED}")
    if version != module.TESTED:
        message = f"{module.PEER} {version} is installed; rlhf_fast is tested with {module.PEER} {module.TESTED}"
        warnings.warn(message, UserWarning, stacklevel=3)


@contextmanager
def _told_what_is_missing(module: ModuleType) -> Iterator[None]:
    """Says which package the peer itself imports and does not find, and what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", module.PEER.replace("-", "_"), _name(module)) or find_spec(missing) is not None:
            raise
        message = f"{module.PEER} imports {error.name}, which is not installed: pip install {missing.replace('_', '-')}"
        hint = getattr(module, "WITHOUT", {}).get(missing, "")
        raise ModuleNotFoundError(message + hint, name=error.name) from error


def _found(dotted: str, ours: Any) -> _Swap:
    """Where the last part of `dotted` is kept, and what stands there."""
    path, _, key = dotted.rpartition(".")
    owner = _resolved(path)
    if isinstance(owner, dict):
        return _Swap(dotted, owner, key, owner.get(key, _ABSENT), ours)
    getattr(owner, key, None)  # a lazy module loads it now
    if key not in vars(owner):
        raise AttributeError(f"{path} has no {key!r} to replace: is its version supported?")
    theirs = vars(owner)[key]
    if not callable(theirs) and not isinstance(theirs, (staticmethod, classmethod)):  # None has many names
        raise TypeError(f"{dotted} must be a function or a class to be replaced, got {theirs!r}")
    return _Swap(dotted, owner, key, theirs, ours)


def _resolved(path: str) -> Any:
    """The object at a dotted path: modules are imported, what follows is read."""
    parts = path.split(".")
    target: Any = import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if isinstance(target, ModuleType) and not hasattr(target, part):
            import_module(".".join(parts[:i]))
        target = getattr(target, part)
    return target


def _exchange(swaps: list[_Swap], *, to_ours: bool) -> set[str]:
    """Put one object in the place of the other, first where it is defined, then everywhere; returns those names."""
    for swap in swaps:
        _set(swap.owner, swap.key, swap.ours if to_ours else swap.theirs)
    pairs = [(s.theirs, s.ours) if to_ours else (s.ours, s.theirs) for s in swaps if s.theirs is not _ABSENT]
    table = {id(old): new for old, new in pairs}
    names = set()
    for root in _roots():
        for owner, key, dotted in list(_places(root)):
            if id(owner[key]) in table:
                names.add(dotted)
                owner[key] = table[id(owner[key])]
    return names


def _set(owner: Any, key: str, value: Any) -> None:
    if not isinstance(owner, dict):
        setattr(owner, key, value)
    elif value is _ABSENT:
        del owner[key]
    else:
        owner[key] = value


def _places(root: str) -> Iterator[tuple[dict[Any, Any], Any, str]]:
    """(dictionary, key, dotted name) of everything that the loaded modules of a package hold, by name or in a dict."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != root or module is None:
            continue
        for key, value in list(vars(module).items()):
            yield vars(module), key, f"{name}.{key}"
            if type(value) is dict and not key.startswith("__"):
                yield from ((value, inner, f"{name}.{key}.{inner}") for inner in list(value))
