"""The shared values as messages of tailrace.common.v1 and back, and which AnswerRequests ask the same. Domains and chains never call it."""

from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from services.chassis.money import Price, Usage
from tailrace.common.v1 import common_pb2

_HOW_IT_IS_READ = ("deadline_ms", "cancel_on_disconnect", "priority", "whole", "batches")
"""Fields of an AnswerRequest that make it no other request: how long its caller waits, how it reads and how it goes away."""


def asked(request: Any) -> bytes:
    """What an AnswerRequest asks for, as bytes that are the same whenever it is sent again. Whoever compares two requests compares these:
    an edge that took for one what the orchestrator takes for two would charge the second nothing.
    """
    kept = type(request)()
    kept.CopyFrom(request)
    for name in _HOW_IT_IS_READ:
        kept.ClearField(name)
    content: bytes = kept.SerializeToString(deterministic=True)
    return content


def timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def usage_message(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
    )


def usage_value(message: common_pb2.Usage) -> Usage:
    """Raises ValueError for counts that cannot be."""
    return Usage(
        message.input_tokens,
        message.output_tokens,
        message.cache_read_tokens,
        message.cache_write_tokens,
        message.cache_write_1h_tokens,
    )


def price_message(price: Price, valid_from: datetime) -> common_pb2.Price:
    return common_pb2.Price(
        provider=price.provider,
        model=price.model,
        version=price.version,
        valid_from=timestamp(valid_from),
        input_nanousd_per_mtok=price.input,
        output_nanousd_per_mtok=price.output,
        cache_read_nanousd_per_mtok=price.cache_read,
        cache_write_5m_nanousd_per_mtok=price.cache_write_5m,
        cache_write_1h_nanousd_per_mtok=price.cache_write_1h,
        long_context_above_tokens=price.long_context_above_tokens,
        long_input_nanousd_per_mtok=price.long_input,
        long_output_nanousd_per_mtok=price.long_output,
        source=price.source,
    )


def price_value(message: common_pb2.Price) -> Price:
    return Price(
        provider=message.provider,
        model=message.model,
        version=message.version,
        input=message.input_nanousd_per_mtok,
        output=message.output_nanousd_per_mtok,
        cache_read=message.cache_read_nanousd_per_mtok,
        cache_write_5m=message.cache_write_5m_nanousd_per_mtok,
        cache_write_1h=message.cache_write_1h_nanousd_per_mtok,
        long_context_above_tokens=message.long_context_above_tokens,
        long_input=message.long_input_nanousd_per_mtok,
        long_output=message.long_output_nanousd_per_mtok,
        source=message.source,
    )
