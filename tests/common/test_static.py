"""Static files: our modules, and uPlot out of its wheel."""

from __future__ import annotations

import re
from pathlib import Path

from django.conf import settings
from django.contrib.staticfiles import finders

ROOT = Path(settings.BASE_DIR)


def test_only_two_files_come_out_of_the_chart_wheel() -> None:
    listed = [
        path for finder in finders.get_finders() if "Uplot" in type(finder).__name__ for path, _ in finder.list([])
    ]
    assert listed == ["uplot.iife.min.js", "uplot.min.css"]
    assert finders.find("vendor/uplot.iife.min.js")
    assert finders.find("vendor/__init__.py") is None


def test_modules_import_each_other_by_relative_names_that_exist() -> None:
    """The storage gives such imports their hashed names; any other kind would break caching."""
    for module in (ROOT / "static" / "js").glob("*.js"):
        for target in re.findall(r"import[^;]*?from\s+[\"'](.+?)[\"'];", module.read_text()):
            assert target.startswith("./"), f"{module.name} imports {target}"
            assert (module.parent / target).is_file()


def test_our_scripts_never_evaluate_text_or_write_style_attributes() -> None:
    for module in (ROOT / "static" / "js").glob("*.js"):
        text = module.read_text()
        assert not re.search(r"\beval\(|new Function|innerHTML|setAttribute\(\"style\"", text), module.name


def test_no_template_has_inline_style_script_or_handlers() -> None:
    for template in (ROOT / "templates").rglob("*.html"):
        text = re.sub(r"{#.*?#}|{% comment %}.*?{% endcomment %}", "", template.read_text(), flags=re.S)
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son(click|change|load|submit|input)=", text), (
            template
        )
