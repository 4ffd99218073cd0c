"""GRPO and its relatives for JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jgrpo.generate import generate as generate
else:

    def __getattr__(name: str) -> Any:
        # Loaded when asked for: importing a part of jgrpo must not load all of it. What a caller gets is the module,
        # which is callable: it takes this name anyway once something imports it.
        if name == "generate":
            return importlib.import_module("jgrpo.generate")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["generate"]
