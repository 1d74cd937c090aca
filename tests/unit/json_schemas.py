"""JSON schemas as generators write them, and ones that cannot be kept."""

from __future__ import annotations

from typing import Any

STRING: dict[str, Any] = {"type": "string", "maxLength": 3}
NUMBER: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 9}
TAGGED = [
    {
        "type": "object",
        "properties": {"k": {"const": tag}, "v": NUMBER},
        "required": ["k"],
        "additionalProperties": False,
    }
    for tag in ("a", "b")
]


def closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


PYDANTIC_2 = {
    "$defs": {
        "Colour": {"enum": ["red", "blue"], "title": "Colour", "type": "string"},
        "Leaf": closed(
            {"kind": {"const": "leaf", "default": "leaf", "type": "string"}, "n": NUMBER}, required=["kind"]
        ),
        "Node": closed(
            {
                "kind": {"const": "node", "type": "string"},
                "child": {
                    "discriminator": {
                        "mapping": {"leaf": "#/$defs/Leaf", "node": "#/$defs/Node"},
                        "propertyName": "kind",
                    },
                    "oneOf": [{"$ref": "#/$defs/Leaf"}, {"$ref": "#/$defs/Node"}],
                },
            },
            required=["kind", "child"],
        ),
    },
    **closed(
        {
            "colour": {"$ref": "#/$defs/Colour", "description": "of the tree", "default": "red"},
            "tree": {"$ref": "#/$defs/Node"},
            "secret": {"type": "string", "format": "password", "writeOnly": True, "maxLength": 2},
            "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}], "default": None},
            "pair": {"type": "array", "prefixItems": [NUMBER, STRING], "minItems": 2, "maxItems": 2},
            "flags": {"type": "array", "items": {"$ref": "#/$defs/Colour"}, "uniqueItems": True},
        },
        required=["colour", "tree", "flags"],
    ),
    "title": "Model",
}
PYDANTIC_1 = {
    "title": "Model",
    "definitions": {"A": closed({"x": NUMBER}, title="A", required=["x"])},
    **closed(
        {
            "a": {"title": "A", "allOf": [{"$ref": "#/definitions/A"}]},
            "b": {"exclusiveMinimum": 0, "maximum": 3, "type": "integer"},
        },
        required=["a", "b"],
    ),
}
ZOD = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **closed(
        {
            "email": {"type": "string", "format": "email", "pattern": r"^[\w.]{1,3}@[\w]{1,3}\.[a-z]{2}$"},
            "id": {"type": "string", "pattern": r"^\d{2}[a-f\d]{2}$"},
            "n": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
            "record": {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": NUMBER},
            "u": {"anyOf": [{"type": "boolean"}, {"not": {}}]},
        },
        required=["id", "n", "record", "u"],
    ),
}
VICTOOLS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.org/order.json",
    "$defs": {
        "Money": {"type": "object", "properties": {"cents": NUMBER, "unit": {"const": "EUR"}}, "required": ["cents"]}
    },
    **closed(
        {
            "price": {"allOf": [{"$ref": "#/$defs/Money"}, {"title": "price", "$comment": "net"}]},
            "total": {"$ref": "https://example.org/order.json#/$defs/Money", "readOnly": True},
            "state": {"oneOf": [{"const": "NEW", "title": "new"}, {"const": "DONE", "title": "done"}]},
        },
        required=["state"],
        unevaluatedProperties=False,
        javaType="org.example.Order",
        **{"x-order": 1},
    ),
}
NJSONSCHEMA = {
    "$schema": "http://json-schema.org/draft-04/schema#",
    "definitions": {
        "Base": {"type": "object", "discriminator": "t", "required": ["t"], "properties": {"t": {"enum": ["p"]}}}
    },
    **closed(
        {
            "Rate": {"type": "number", "format": "double", "minimum": 0.0, "exclusiveMinimum": True, "maximum": 2.0},
            "Count": {"type": "integer", "format": "int32", "maximum": 3.0, "minimum": 1.0, "nullable": True},
            "Name": {"type": ["null", "string"], "maxLength": 2},
            "Base": {"oneOf": [{"type": "null"}, {"$ref": "#/definitions/Base"}]},
            "Bytes": {"type": "string", "format": "byte", "maxLength": 2},
        },
        required=["Rate", "Count", "Name"],
    ),
    "x-enumNames": ["A"],
}
KEPT: dict[str, Any] = {
    "pydantic 2": PYDANTIC_2,
    "pydantic 1": PYDANTIC_1,
    "zod": ZOD,
    "victools": VICTOOLS,
    "njsonschema": NJSONSCHEMA,
    "unique of an enum": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True},
    "unique of many": {"type": "array", "items": {"enum": list(range(40))}, "uniqueItems": True, "minItems": 1},
    "unique of some": {"type": "array", "items": {"enum": [*"abcdefgh"]}, "uniqueItems": True, "minItems": 3},
    "unique of equal ones": {"items": {"enum": [1, 1.0, True, "1"]}, "uniqueItems": True, "type": ["array", "null"]},
    "unique, one at most": {"type": "array", "items": STRING, "uniqueItems": True, "maxItems": 1},
    "unique booleans": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 2},
    "oneOf by a tag": {"oneOf": TAGGED},
    "oneOf by a tag that has a default": closed(
        {
            "pet": {
                "discriminator": {"propertyName": "k", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            }
        },
        required=["pet"],
        **{
            "$defs": {
                "Cat": closed({"k": {"const": "cat", "default": "cat"}, "n": NUMBER}),
                "Dog": closed({"k": {"const": "dog", "default": "dog"}, "friend": {"$ref": "#/$defs/Cat"}}),
            }
        },
    ),
    "oneOf by a tag within a tree": {
        "$defs": {
            "Leaf": closed({"k": {"const": "leaf", "default": "leaf"}}),
            "Node": closed(
                {
                    "k": {"const": "node", "default": "node"},
                    "of": {"oneOf": [{"$ref": "#/$defs/Leaf"}, {"$ref": "#/$defs/Node"}]},
                },
                required=["of"],
            ),
        },
        "$ref": "#/$defs/Node",
    },
    "anyOf with a branch that is not kept": closed(
        {"price": {"anyOf": [{"type": "integer", "maximum": 9}, {"type": "string", "pattern": r"^(?!0)\d{1,2}$"}]}},
        required=["price"],
    ),
    "Pydantic's Decimal": {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", "maxLength": 6},
    "Zod's email": {
        "type": "string",
        "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        "maxLength": 9,
    },
    "a recursive type that is said twice": {
        "type": "object",
        "id": "urn:jsonschema:org:example:Tree",
        "properties": {"n": NUMBER, "child": {"type": "object", "$ref": "urn:jsonschema:org:example:Tree"}},
        "additionalProperties": False,
    },
    "oneOf by type": {"oneOf": [STRING, NUMBER, {"type": "null"}]},
    "oneOf by range": {"type": "integer", "oneOf": [{"maximum": 2, "minimum": 0}, {"minimum": 3, "maximum": 4}]},
    "oneOf by what is required": closed({"a": NUMBER, "b": NUMBER}, oneOf=[{"required": ["a"]}, {"required": ["b"]}]),
    "oneOf by what allOf has": {
        "$defs": {"Base": {"type": "object", "properties": {"t": {"type": "string"}}, "required": ["t"]}},
        "oneOf": [
            {"allOf": [{"$ref": "#/$defs/Base"}, closed({"t": {"const": "a"}, "n": NUMBER})]},
            {"allOf": [{"$ref": "#/$defs/Base"}, closed({"t": {"const": "b"}})]},
            {"allOf": [STRING]},
        ],
    },
    "several conditions": closed(
        {"t": {"enum": ["a", "b", "c"]}, "v": True},
        required=["t", "v"],
        allOf=[
            {"if": {"properties": {"t": {"const": tag}}}, "then": {"properties": {"v": then}}}
            for tag, then in (("a", NUMBER), ("b", STRING), ("c", {"type": "null"}))
        ],
    ),
    "a required name that is not listed": {
        "type": "object",
        "properties": {"a": NUMBER},
        "required": ["z"],
        "additionalProperties": NUMBER,
        "maxProperties": 2,
    },
    "escapes in a pattern": {"type": "string", "pattern": r"^\/\-\.\u00e9[\u0041-\u0043]\x41$"},
    "oneOf by what is closed": {
        "oneOf": [closed({"a": NUMBER}, required=["a"]), closed({"b": NUMBER}, required=["b"])]
    },
    "anyOf of requirements": closed({"a": NUMBER, "b": NUMBER}, anyOf=[{"required": ["a"]}, {"required": ["b"]}]),
    "allOf merges": closed(
        {"a": True, "b": True}, allOf=[{"properties": {"a": NUMBER}}, {"required": ["a"], "properties": {"b": STRING}}]
    ),
    "recursion": closed({"v": NUMBER, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, required=["v", "next"]),
    "an odd reference": {
        "properties": {"a/b": NUMBER, "c": {"$ref": "#/properties/a~1b"}},
        "required": ["c", "a/b"],
        "type": "object",
        "additionalProperties": False,
    },
    "an anchor": {"$defs": {"x": {"$anchor": "here", **NUMBER}}, "$ref": "#here"},
    "an unused definition": {"$defs": {"x": {"pattern": "(?=a)"}}, **NUMBER},
    "dependentRequired": closed({"a": NUMBER, "b": NUMBER}, dependentRequired={"a": ["b"]}),
    "dependencies": closed(
        {"a": NUMBER, "b": NUMBER}, dependencies={"a": ["b"], "b": {"properties": {"a": {"maximum": 3}}}}
    ),
    "if then else": closed(
        {"in": {"enum": ["us", "de", "fr"]}, "zip": {"type": "string", "maxLength": 5}},
        required=["in", "zip"],
        **{
            "if": {"properties": {"in": {"const": "us"}}},
            "then": {"properties": {"zip": {"pattern": "^[0-9]{5}$"}}},
            "else": {"properties": {"zip": {"pattern": "^[A-Z]{2}$"}}},
        },
    ),
    "if then": closed({"a": NUMBER, "b": NUMBER}, **{"if": {"required": ["a"]}, "then": {"required": ["b"]}}),
    "if else": closed({"a": NUMBER, "b": NUMBER}, **{"if": {"required": ["a"]}, "else": {"required": ["b"]}}),
    "if then else of any kind": {
        "if": {"type": "integer"},
        "then": {"maximum": 5},
        "else": {"type": ["string", "integer"]},
        "minimum": 0,
        "maxLength": 2,
    },
    "not of an enum": {"enum": ["a", "b", "c"], "not": {"enum": ["b"]}},
    "not of types": {"not": {"type": ["object", "array", "string", "number"]}},
    "not a property": closed({"a": NUMBER, "b": NUMBER}, **{"not": {"required": ["a"]}}),
    "minProperties": closed({"a": NUMBER, "b": NUMBER, "c": NUMBER}, minProperties=2),
    "maxProperties": closed({"a": NUMBER, "b": NUMBER, "c": NUMBER}, maxProperties=1),
    "both of them": {
        "type": "object",
        "properties": {"a": NUMBER},
        "additionalProperties": NUMBER,
        "minProperties": 2,
        "maxProperties": 2,
        "propertyNames": {},
    },
    "names of a pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-c]{1,2}$"},
        "additionalProperties": NUMBER,
        "maxProperties": 2,
    },
    "names of a length": {
        "type": "object",
        "propertyNames": {"minLength": 1, "maxLength": 2},
        "additionalProperties": NUMBER,
        "maxProperties": 1,
    },
    "patternProperties": {
        "type": "object",
        "patternProperties": {r"^x-\d$": NUMBER},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "unevaluatedProperties": {
        "type": "object",
        "allOf": [{"properties": {"a": NUMBER}}],
        "properties": {"b": NUMBER},
        "unevaluatedProperties": False,
    },
    "contains": {"type": "array", "items": NUMBER, "contains": {"minimum": 8}, "minContains": 2, "maxItems": 4},
    "a tuple of old": {"type": "array", "items": [NUMBER, STRING], "additionalItems": False},
    "classes are of ASCII": {"type": "string", "pattern": r"^\d\w\s.[^\d][\w-]$"},
    "brackets in a class": {"type": "string", "pattern": r"^[[&&~~\]+--]{1,3}$"},
    "a format that goes not with its pattern": {"type": "string", "format": "email", "pattern": "^[a-z]{1,3}$"},
    "an enum of many": {"anyOf": [{"const": f"label {i}"} for i in range(2000)]},
    "oneOf of many": {"oneOf": [{"const": f"label {i}", "title": f"L{i}"} for i in range(2000)]},
}
PATH_OF_T = "$defs.T.properties.t.$ref"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"properties": {"a": {"type": "string", "pattern": "^(?!x)[0-9]+$"}}}, "properties.a.pattern"),
    ({"$defs": {"A": {"pattern": r"(a)\1"}}, "items": {"$ref": "#/$defs/A"}}, "$defs.A.pattern"),
    ({"type": "array", "items": STRING, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 3}, "uniqueItems"),
    ({"oneOf": [{"minimum": 3}, {"maximum": 5}]}, "oneOf"),
    ({"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}]}, "oneOf"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ({"anyOf": [{"uniqueItems": True}, {"pattern": "^(?!a)"}]}, "anyOf[0].uniqueItems"),
    ({"anyOf": [{"type": "number"}, {"pattern": "^(?!a)", "type": "any"}]}, "anyOf[1].type"),
    (
        {"$defs": {"T": {"properties": {"t": {"$ref": "#/$defs/T", "minProperties": 1}}}}, "$ref": "#/$defs/T"},
        PATH_OF_T,
    ),
    ({"not": {"minLength": 3}}, "not"),
    ({"type": "object", "properties": {"x": {"$ref": "https://example.org/x"}}}, "properties.x.$ref"),
    ({"$ref": "#/definitions/Missing"}, "$ref"),
    ({"$ref": "#"}, "$ref"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "$ref"),
    ({"patternProperties": {"^(?!a)": {}}}, "patternProperties.^(?!a)"),
    ({"propertyNames": {"pattern": "^a"}, "properties": {"b": {}}}, "propertyNames"),
    ({"type": "any"}, "type"),
    ({"properties": {"a": {"type": "string", "required": True}}}, "properties.a.required"),
    ({"minimum": "3"}, "minimum"),
    ({"maxLength": -1}, "maxLength"),
    ({"enum": []}, "enum"),
    ({"allOf": {}}, "allOf"),
    ({"items": 3}, "items"),
    ({"maxProperties": 1, "required": ["a", "b"], "properties": {"a": {}, "b": {}}}, "maxProperties"),
    ({"unevaluatedProperties": False, "anyOf": [{"properties": {"a": {}}}]}, "unevaluatedProperties"),
    ({"oneOf": [{"type": "object", "minProperties": i} for i in range(200)]}, "oneOf"),
]
