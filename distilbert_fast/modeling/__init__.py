"""The transformers side. This file imports nothing of transformers; the modules beside it do."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TRANSFORMERS = "transformers.modeling_utils"  # what every model class of transformers imports


def register() -> None:
    """Make ``attn_implementation="distilbert_fast"`` and the int8 quantizer known to transformers."""
    # Each registers itself as it is imported, also when that import is what brought transformers in and is not over.
    from distilbert_fast.modeling import attention_interface, quantizer  # noqa: F401


def register_on_import() -> None:
    """Call ``register()`` now if transformers' models are imported already, else as soon as they are.

    Until then this costs nothing: neither transformers nor torch is imported.
    """
    if _TRANSFORMERS in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the other finders import transformers.modeling_utils, then calls ``register``, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRANSFORMERS:
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(place, self)  # a search need not end in an import
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
