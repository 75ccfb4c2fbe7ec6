"""Static files: hashed names, also in the imports of our JavaScript modules, and uPlot from its wheel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from django.contrib.staticfiles.finders import BaseFinder
from django.contrib.staticfiles.storage import HashedFilesMixin
from django.core.files.storage import FileSystemStorage, Storage
from whitenoise.storage import CompressedManifestStaticFilesStorage  # type: ignore[import-untyped]

VENDOR_FILES = ("uplot.iife.min.js", "uplot.min.css")


class ModuleStaticFilesStorage(CompressedManifestStaticFilesStorage):  # type: ignore[misc]
    """Without the aggregation ``import "./socket.js"`` would ask for a name that may not be cached."""

    support_js_module_import_aggregation = True
    # Ours only: in other people's files the same patterns match comments.
    _js_module_import_aggregation_patterns = (
        "js/*.js",
        HashedFilesMixin._js_module_import_aggregation_patterns[1],  # type: ignore[attr-defined]
    )


class UplotFinder(BaseFinder):
    """uPlot, minified, as ``vendor/…``: two files of the youplot package, found without importing it."""

    def __init__(self, app_names: Any = None, *args: Any, **kwargs: Any) -> None:
        found = importlib.util.find_spec("youplot")
        if found is None or found.origin is None:
            raise FileNotFoundError("The package youplot, which brings uPlot, is not installed. Run make up again.")
        self.root = Path(found.origin).parent / "vendor"
        self.storage = FileSystemStorage(location=self.root)
        self.storage.prefix = "vendor"  # type: ignore[attr-defined]  # collectstatic reads it

    def find(self, path: str, find_all: bool = False, **kwargs: Any) -> Any:
        folder, _, name = path.rpartition("/")
        if folder != "vendor" or name not in VENDOR_FILES:
            return []
        return [str(self.root / name)] if find_all else str(self.root / name)

    def list(self, ignore_patterns: Iterable[str] | None) -> Iterator[tuple[str, Storage]]:
        for name in VENDOR_FILES:
            yield name, self.storage

    def check(self, **kwargs: Any) -> Any:
        return []
