"""The JSON Schema of configurations, for editors: it accepts what oodcore accepts."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from oodcore.component import Component, notes
from oodcore.config import BenchmarkConfig, DetectorConfig, EnsembleConfig
from oodcore.errors import ConfigurationError
from oodcore.plugins import registry
from oodcore.training_config import TrainingConfig

TARGETS: dict[str, type[BaseModel]] = {
    "detector": DetectorConfig,
    "ensemble": EnsembleConfig,
    "benchmark": BenchmarkConfig,
    "training": TrainingConfig,
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def schema(target: str = "detector") -> Schema:
    """The JSON Schema (draft 2020-12) of a whole configuration, with every installed kind.

    Each slot is a definition: a kind alone, where its class needs no field, or a mapping with the
    kind and its fields. What a schema cannot say, such as rules between fields, it leaves open.

    Args:
        target: "detector", "ensemble", "benchmark" or "training".

    Raises:
        ConfigurationError: another target.
    """
    if target not in TARGETS:
        raise ConfigurationError(
            f"there is no schema '{target}'; there are: {', '.join(sorted(TARGETS))}"
        )
    definitions: Schema = {}
    top = _linked(_generated(TARGETS[target], target, definitions), definitions)
    return {"$schema": DIALECT, **top, "$defs": dict(sorted(definitions.items()))}


class _Generator(GenerateJsonSchema):
    """Without titles, which repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _generated(model: type[BaseModel], name: str, definitions: Schema) -> Schema:
    """A model's schema; the groups of fields inside it become definitions of their own."""
    found = model.model_json_schema(
        ref_template=f"#/$defs/{name}.{{model}}", schema_generator=_Generator
    )
    for inner, body in found.pop("$defs", {}).items():
        definitions[f"{name}.{inner}"] = _brief(_linked(body, definitions))
    for field, text in notes(model).items():
        if field in found.get("properties", {}):
            found["properties"][field]["description"] = text
    return _brief(found)


def _linked(node: Any, definitions: Schema) -> Any:
    """The same schema, with references to the slots in it, which become definitions."""
    if isinstance(node, list):
        return [_linked(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    linked = {key: _linked(item, definitions) for key, item in node.items() if key != "x-slot"}
    if slot := node.get("x-slot"):
        if slot not in definitions:
            _define(slot, definitions)
        linked["$ref"] = f"#/$defs/{slot}"
    return linked


def _define(slot: str, definitions: Schema) -> None:
    definitions[slot] = False
    kinds = registry.all(slot)
    if not kinds:
        return
    alone = [kind for kind, cls in kinds.items() if not _required(cls)]
    choices: list[Schema] = [{"enum": alone}] if alone else []
    choices += [{"$ref": f"#/$defs/{slot}.{kind}"} for kind in kinds]
    definitions[slot] = {"anyOf": choices}
    for kind, cls in kinds.items():
        name = f"{slot}.{kind}"
        definitions[name] = False
        definitions[name] = _of_component(_generated(cls, name, definitions), kind, definitions)


def _of_component(found: Schema, kind: str, definitions: Schema) -> Schema:
    fields = _linked(found.get("properties", {}), definitions)
    return {
        **found,
        "title": kind,
        "properties": {"kind": {"const": kind}, **fields},
        "required": ["kind", *found.get("required", ())],
    }


def _required(cls: type[Component]) -> bool:
    return any(field.is_required() for field in cls.model_fields.values())


def _brief(found: Schema) -> Schema:
    """A schema whose description is the first paragraph of the docstring."""
    if "description" not in found:
        return found
    first, _, _ = inspect.cleandoc(found["description"]).partition("\n\n")
    return {**found, "description": " ".join(first.split())}
