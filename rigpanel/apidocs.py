"""Turns an OpenAPI description into what the docs page shows."""

from __future__ import annotations

import re
from typing import Any

from django.utils.html import escape
from django.utils.safestring import SafeString, mark_safe


def type_words(schema: dict[str, Any]) -> str:
    """A JSON schema's type in a few words: "integer or null", "list of JobOut", "viewer | member"."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            words = [type_words(part) for part in schema[union]]
            return " or ".join(dict.fromkeys(words))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {type_words(schema.get('items', {}))}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"object of {type_words(values)}" if isinstance(values, dict) and values else "object"
    return str(schema.get("format") or kind)


def marked(text: str) -> SafeString:
    """Text with ``code`` and *emphasis* as the docstrings and descriptions write them."""
    html = re.sub(r"`{1,2}([^`]+)`{1,2}", r"<code>\1</code>", str(escape(text)))
    return mark_safe(re.sub(r"\*([^*\n]+)\*", r"<em>\1</em>", html))  # noqa: S308 - escaped just above


def fields_of(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = set(schema.get("required", ()))
    return [
        {
            "name": name,
            "type": type_words(details),
            "required": name in required,
            "default": details.get("default"),
            "description": details.get("description", ""),
        }
        for name, details in schema.get("properties", {}).items()
    ]


def described(schema: dict[str, Any]) -> dict[str, Any]:
    """``title``, ``description``, ``groups`` of operations by tag, and ``schemas`` with their fields."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, details in methods.items():
            body = details.get("requestBody", {}).get("content", {})
            groups.setdefault((details.get("tags") or ["other"])[0], []).append(
                {
                    "id": details["operationId"],
                    "method": method.upper(),
                    "path": path,
                    "summary": details.get("summary", ""),
                    "description": marked(details.get("description", "")),
                    "role": details.get("x-role", ""),
                    "parameters": [
                        {
                            "name": parameter["name"],
                            "where": parameter["in"],
                            "type": type_words(parameter["schema"]),
                            "required": parameter.get("required", False),
                            "default": parameter["schema"].get("default"),
                        }
                        for parameter in details.get("parameters", [])
                    ],
                    "body": next((type_words(content["schema"]) for content in body.values()), ""),
                    "answers": [
                        (
                            status,
                            next(
                                (type_words(c["schema"]) for c in answer.get("content", {}).values() if "schema" in c),
                                "",
                            ),
                        )
                        for status, answer in details["responses"].items()
                    ],
                }
            )
    return {
        "title": schema["info"]["title"],
        "description": [marked(paragraph) for paragraph in schema["info"]["description"].split("\n\n")],
        "groups": sorted(groups.items()),
        "schemas": [
            {"name": name, "description": marked(details.get("description", "")), "fields": fields_of(details)}
            for name, details in schema["components"]["schemas"].items()
            if details.get("type") == "object"
        ],
    }
