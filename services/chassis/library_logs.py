"""What libraries log: that they did, where, and what was raised, as lines of our own. Their words may quote a question or an answer."""

import logging
from pathlib import PurePath

import structlog

log = structlog.get_logger(__name__)


class Wordless(logging.Handler):
    """Tells of every warning and error without its text."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        said = log.warning if record.levelno < logging.ERROR else log.error
        place = f"{PurePath(record.pathname).name}:{record.lineno}"
        said("library_complained", library=record.name, place=place, exc_info=record.exc_info)
