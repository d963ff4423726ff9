"""How weights are led to their levels: one file for each published method.

A new method is one file with a subclass of ``Method``, and its line in METHODS. Settings of its own stand with all
others in ``cbpq.presets``, and those of its paper in PAPER_METHODS there.
"""

from cbpq.errors import UsageError, did_you_mean
from cbpq.methods.adaste import AdaSTE
from cbpq.methods.askewsgd import AskewSGD
from cbpq.methods.base import Method
from cbpq.methods.cbp import CBP
from cbpq.methods.proxquant import ProxQuant
from cbpq.methods.straight_through import StraightThrough

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        CBP,
        StraightThrough,
        ProxQuant,
        AdaSTE,
        AskewSGD,
    )
}


def method_class(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; known are {', '.join(METHODS)}")
    return METHODS[name]
