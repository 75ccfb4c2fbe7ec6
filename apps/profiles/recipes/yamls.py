"""YAML from strangers: plain data only, with limits on size, depth and on what aliases unfold to."""

from __future__ import annotations

from typing import Any

import yaml

from apps.profiles.recipes.result import RecipeError

DEPTH_MAX = 30
NODES_MAX = 20_000  # with every alias unfolded


def load_yaml(text: str) -> Any:
    """The first document as plain values. Raises RecipeError with a sentence.

    Tags other than YAML's own are refused (``safe_load`` makes no objects), as are aliases that contain themselves or
    unfold to more than 20,000 values (the "billion laughs")."""
    loader = yaml.SafeLoader(text)
    try:
        _check_depth(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, set()) > NODES_MAX:
            raise RecipeError(f"This YAML unfolds to more than {NODES_MAX} values.")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"This is not YAML that can be read: {error.problem}{where}.") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise RecipeError(f"This is not YAML that can be read: {str(error)[:200]}.") from None
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_MAX:
                raise RecipeError(f"This YAML is nested more than {DEPTH_MAX} deep.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _size(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """Values below a node, aliases counted as often as they are used."""
    if id(node) in open_nodes:
        raise RecipeError("An alias in this YAML contains itself.")
    if id(node) not in known:
        open_nodes.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(_size(child, known, open_nodes) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(_size(key, known, open_nodes) + _size(value, known, open_nodes) for key, value in node.value)
        open_nodes.discard(id(node))
        known[id(node)] = min(total, NODES_MAX + 1)
    return known[id(node)]
