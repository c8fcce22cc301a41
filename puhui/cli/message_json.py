"""Protobuf messages as JSON for scripts.

The mapping is protobuf's own with the field names of the .proto files, and with two differences that
spare scripts trouble: 64-bit integers are numbers, and every field is there, null when it is not set.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

__all__ = ["json_of"]


def json_of(message: Message) -> Any:
    """Returns what `json.dumps` takes for a message."""
    if isinstance(message, Timestamp | Duration):
        return message.ToJsonString()
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of_value = field.message_type.fields_by_name["value"]
            return {str(key): _single(value[key], of_value) for key in sorted(value)}
        return [_single(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _single(value, field)


def _single(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return json_of(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
