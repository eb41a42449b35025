"""ModelConfig as a mapping, a message and text: whatever is valid comes back the same, whatever is not is named."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritonbuild import message
from tritonbuild.message import _is_repeated, _kind

INTEGERS = {
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    "uint64": st.integers(0, 2**64 - 1),
}
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    **INTEGERS,
    "bool": st.booleans(),
    "string": st.text(st.characters(codec="utf-8"), max_size=8),
    "float": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "double": st.floats(allow_nan=False, allow_infinity=False),
}


def one(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return st.deferred(lambda: messages(field.message_type))
    if field.enum_type is not None:
        return st.sampled_from([value.name for value in field.enum_type.values if value.name != "TYPE_INVALID"])
    return SCALARS[_kind(field)]


def values(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return st.dictionaries(one(entry["key"]), one(entry["value"]), max_size=2)
    return st.lists(one(field), max_size=2) if _is_repeated(field) else one(field)


@st.composite
def messages(draw: st.DrawFn, descriptor: Any) -> dict[str, Any]:
    """Draw a mapping that is valid for a message: any of its fields, at most one of each oneof."""
    names = (
        draw(st.lists(st.sampled_from([f.name for f in descriptor.fields]), max_size=3, unique=True))
        if descriptor.fields
        else []
    )
    drawn: dict[str, Any] = {}
    taken: set[str] = set()
    for name in names:
        field = descriptor.fields_by_name[name]
        choice = field.containing_oneof.name if field.containing_oneof else name
        if choice not in taken:
            taken.add(choice)
            drawn[name] = draw(values(field))
    return drawn


MODEL_CONFIGS = st.deferred(lambda: messages(message.model_config().DESCRIPTOR))
MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@MANY
@given(MODEL_CONFIGS)
def test_every_valid_mapping_becomes_text_that_parses_back_to_the_same_message(mapping: dict[str, Any]) -> None:
    problems: list[Any] = []
    built = message.build(message.read(mapping, problems))
    assert problems == []
    text = message.text(built)
    assert message.parse(text) == built
    assert message.text(message.parse(text)) == text
    assert text.endswith("\n")
    assert text.count("\nmax_batch_size: ") + text.startswith("max_batch_size: ") == 1


def turned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(entry) for entry in value] if isinstance(value, list) else value


@MANY
@given(MODEL_CONFIGS)
def test_the_order_of_keys_does_not_matter(mapping: dict[str, Any]) -> None:
    first, second = (message.text(message.build(message.read(way, []))) for way in (mapping, turned(mapping)))
    assert first == second


@MANY
@given(MODEL_CONFIGS, st.data())
def test_a_key_that_is_not_known_is_named_wherever_it_is(mapping: dict[str, Any], data: st.DataObject) -> None:
    places = list(messages_in(mapping, message.model_config().DESCRIPTOR, ()))
    at, owner = data.draw(st.sampled_from(places))
    owner["not_a_field"] = 1
    problems: list[Any] = []
    message.read(mapping, problems)
    assert [(where, what.split(" has no such field")[1:] != []) for where, what in problems] == [
        ((*at, "not_a_field"), True)
    ]


def messages_in(mapping: dict[str, Any], descriptor: Any, at: tuple[Any, ...]) -> Any:
    yield at, mapping
    for name, value in mapping.items():
        field = descriptor.fields_by_name[name]
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"].message_type
            for key, entry in value.items() if inner else ():
                yield from messages_in(entry, inner, (*at, name, str(key)))
        elif _is_repeated(field):
            for i, entry in enumerate(value):
                yield from messages_in(entry, field.message_type, (*at, name, i))
        else:
            yield from messages_in(value, field.message_type, (*at, name))


def read(mapping: dict[Any, Any]) -> tuple[dict[str, Any], list[Any]]:
    problems: list[Any] = []
    return message.read(mapping, problems), problems


def test_a_parameter_may_be_plain_text() -> None:
    long = {"parameters": {"A": {"string_value": "true"}, "B": {"string_value": "2"}}}
    assert read({"parameters": {"A": "true", "B": {"string_value": "2"}}}) == (long, [])


def test_keys_of_maps_may_be_numbers_or_their_text_as_after_json() -> None:
    for key in (2, "2"):
        mapping = {"dynamic_batching": {"priority_queue_policy": {key: {"max_queue_size": 1}}}}
        built = message.build(read(mapping)[0])
        assert list(built.dynamic_batching.priority_queue_policy) == [2]


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("int32", -(2**31), 2**31 - 1),
        ("int64", -(2**63), 2**63 - 1),
        ("uint32", 0, 2**32 - 1),
        ("uint64", 0, 2**64 - 1),
    ],
)
def test_integers_are_taken_up_to_their_limits(kind: str, low: int, high: int) -> None:
    path = {
        "int32": ("instance_group", "count"),
        "int64": ("input", "dims"),
        "uint32": ("model_warmup", "count"),
        "uint64": ("dynamic_batching", "priority_levels"),
    }[kind]

    def mapping(value: int) -> dict[str, Any]:
        inner = {path[1]: [value] if path[1] == "dims" else value}
        return {path[0]: inner if path[0] == "dynamic_batching" else [inner]}

    at = (path[0], *([] if path[0] == "dynamic_batching" else [0]), path[1], *([0] if path[1] == "dims" else []))
    for value in (low, high):
        assert read(mapping(value))[1] == []
        assert message.parse(message.text(message.build(mapping(value)))) == message.build(mapping(value))
    for value in (low - 1, high + 1):
        assert read(mapping(value))[1] == [(at, f"found {value}, expected a number from {low} to {high}")]


def test_numbers_with_a_fraction() -> None:
    def mapping(value: Any) -> dict[str, Any]:
        return {"sequence_batching": {"direct": {"minimum_slot_utilization": value}}}

    at = ("sequence_batching", "direct", "minimum_slot_utilization")
    assert [read(mapping(value))[1] for value in (0, 1, 0.5, -3.4028234663852886e38)] == [[], [], [], []]
    assert read(mapping(3.5e38))[1] == [(at, "found 3.5e+38, expected a number that 32 bits can hold")]
    assert read(mapping(float("nan")))[1] == [(at, "found nan, expected a number")]
    assert read(mapping(True))[1] == [(at, "found true, expected a number")]
    assert read(mapping("0.5"))[1] == [(at, 'found "0.5", expected a number')]


def test_text_is_text_that_utf_8_can_hold() -> None:
    assert read({"metric_tags": {"a": "\ud800"}})[1] == [
        (("metric_tags", "a"), 'found "\\ud800", expected text that UTF-8 can hold')
    ]
    odd = {"metric_tags": {"a": string.printable, "é": "日本 \x00\x7f\u2028"}}
    assert message.parse(message.text(message.build(odd))) == message.build(odd)


def test_the_message_is_the_one_that_tritonclient_has() -> None:
    built = message.build({"name": "x", "input": [{"name": "y", "dims": [-1]}]})
    from tritonclient.grpc import model_config_pb2

    again = model_config_pb2.ModelConfig(name="x", input=[model_config_pb2.ModelInput(name="y", dims=[-1])])
    assert built == again
    assert message.fields() == [field.name for field in model_config_pb2.ModelConfig.DESCRIPTOR.fields]
