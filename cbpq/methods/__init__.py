"""How weights are led to their levels: one file for each published method.

A new method is a new file here, of the method's name, with a subclass of ``Method`` and its settings; nothing else has
to know of it.
"""

from collections.abc import Iterator
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules

from cbpq.errors import UsageError, did_you_mean
from cbpq.methods.base import Method


def _methods() -> Iterator[type[Method]]:
    for file in iter_modules(__path__, f"{__name__}."):
        for thing in vars(import_module(file.name)).values():
            if isinstance(thing, type) and issubclass(thing, Method) and not isabstract(thing):
                yield thing


METHODS: dict[str, type[Method]] = {method.name: method for method in _methods()}


def method_class(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; known are {', '.join(METHODS)}")
    return METHODS[name]
