"""Model families: what the conversion must know of an architecture beyond its layers' types.

One small file per family. A file in this folder that calls ``register`` is all a new family needs; own code may call
``register`` too::

    from bcosification.convert.families import Family, register

    @register("my_package.MyNet")
    class MyNetFamily(Family):
        def input_layer(self, model): return "stem.conv"
        def head(self, model): return "classifier"
"""

from __future__ import annotations

import importlib
import pkgutil

from bcosification.convert.class_change import ChangedForward, change_class, original_class
from bcosification.convert.families.base import FAMILIES, Family, HeadBeforePool, family_of, register

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FAMILIES",
    "ChangedForward",
    "Family",
    "HeadBeforePool",
    "change_class",
    "family_of",
    "original_class",
    "register",
]
