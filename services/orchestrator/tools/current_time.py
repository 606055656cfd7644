"""The tool `current_time`: date and time in any time zone. The clock is handed in."""

from collections.abc import Mapping
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from services.chassis.clock import Clock
from services.orchestrator.domain import Question, ToolSpec
from services.orchestrator.tools.toolbox import Output, ToolFailed


class CurrentTime:
    """The tool."""

    spec = ToolSpec(
        "current_time",
        "The current date, weekday and time in a time zone. Use it whenever the answer depends on today or now.",
        {
            "type": "object",
            "properties": {
                "timezone": {
                    "type": "string",
                    "minLength": 1,
                    "maxLength": 64,
                    "pattern": "^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$",
                    "description": "IANA name, for example Europe/Berlin. UTC if it is left out.",
                }
            },
            "additionalProperties": False,
        },
    )
    output_schema: Mapping[str, Any] | None = None

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def call(self, arguments: Mapping[str, Any], asked: Question) -> Output:
        name = arguments.get("timezone", "UTC")
        try:
            zone = ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ToolFailed("there is no time zone of this name; use an IANA name such as Europe/Berlin") from None
        now = self._clock.now().astimezone(zone)
        return Output(f"{now:%A}, {now.isoformat(timespec='seconds')} ({name})")
