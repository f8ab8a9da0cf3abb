"""Render a report's templates. Whatever comes from data or configuration is escaped."""

from __future__ import annotations

from typing import Any

import jinja2

from llm2clip_eval.statistics import signed

MARKDOWN_SPECIALS = str.maketrans({character: "\\" + character for character in "\\`*_[]<>|#$~"})


def render(template: str, report: dict[str, Any]) -> str:
    """Fill a template of this package's `templates/`.

    Args:
        template: file name; one that ends in `.html.jinja` is autoescaped for HTML, the other must use `| md`.
        report: what `report.collect` gathered, with `figures`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llm2clip_eval"),
        autoescape=template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": markdown_text, "signed": signed}
    return environment.get_template(template).render(report)


def markdown_text(text: object) -> str:
    """Text that stays what it is in Markdown, also within a table."""
    return " ".join(str(text).split()).translate(MARKDOWN_SPECIALS)
