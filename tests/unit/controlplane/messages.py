"""Any message of the contract, for hypothesis."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

__all__ = ["message_of"]

_M = TypeVar("_M", bound=Message)
_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 9),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32, allow_nan=False),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(allow_nan=False),
}


def message_of(kind: type[_M], text: st.SearchStrategy[str], data: st.SearchStrategy[bytes]) -> st.SearchStrategy[_M]:
    """Returns messages of a kind, with any of its fields.

    Args:
        kind: what message.
        text: what its strings are.
        data: what its bytes are.
    """
    return st.composite(lambda draw: _fill(draw, kind(), text, data, 4))()


def _fill(draw: Any, message: Any, text: Any, data: Any, depth: int) -> Any:
    fields = [field for field in message.DESCRIPTOR.fields if field.message_type is None or depth]
    if not fields:
        return message
    for field in draw(st.lists(st.sampled_from(fields), max_size=5, unique_by=lambda field: field.name)):
        _set(draw, message, field, text, data, depth)
    return message


def _set(draw: Any, message: Any, field: FieldDescriptor, text: Any, data: Any, depth: int) -> None:
    inside = getattr(message, field.name)
    if field.message_type is None:
        if field.is_repeated:
            inside.extend(draw(st.lists(_plain(field, text, data), max_size=2)))
        else:
            setattr(message, field.name, draw(_plain(field, text, data)))
    elif field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for name in draw(st.lists(_plain(key, text, data), max_size=2)):
            if value.message_type is None:
                inside[name] = draw(_plain(value, text, data))
            else:
                _fill(draw, inside[name], text, data, depth - 1)
    elif field.is_repeated:
        for _ in range(draw(st.integers(0, 2))):
            _fill(draw, inside.add(), text, data, depth - 1)
    else:
        empty = message_factory.GetMessageClass(field.message_type)()
        inside.CopyFrom(_fill(draw, empty, text, data, depth - 1))
        inside.SetInParent()


def _plain(field: FieldDescriptor, text: Any, data: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return text
    return data if field.type == FieldDescriptor.TYPE_BYTES else _WHOLE[field.cpp_type]
