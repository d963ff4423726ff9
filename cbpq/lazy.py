"""Libraries that take seconds to import, imported when they are first needed."""

import importlib
from typing import Any


class Lazy:
    """Stands for a module; whatever is asked of it is asked of the module.

    Args:
        name: the module's, as one imports it.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
