"""The process that reads files for the service: one after the other, from its standard input to its standard output, confined.

    python -m services.retrieval.parsers.worker PARENT_PID MEMORY_MIB SECONDS

It holds nothing that is worth stealing: no settings, no secrets, no connection, one file at a time.
"""

import os
import sys
from typing import BinaryIO

from services.chassis.errors import DocumentRejected
from services.retrieval.parsers import read
from services.retrieval.parsers.confinement import MemoryGauge, allow_seconds, confine
from services.retrieval.parsers.frames import LENGTH, OUT_OF_MEMORY, OUTCOME_BYTES_MAX, TASK, Outcome, Task, framed
from services.retrieval.parsers.rejection import rejected


def main() -> None:
    parent, memory_mib, seconds = map(int, sys.argv[1:4])
    tasks, outcomes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a library prints would break the frames, and may quote the file.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    gauge = MemoryGauge()
    confine(parent, memory_mib)
    _send(outcomes, framed(None))
    try:
        while header := tasks.read(LENGTH.size):
            body = tasks.read(*LENGTH.unpack(header))
            allow_seconds(seconds)
            _send(outcomes, _outcome(body, gauge))
    except MemoryError:
        # Not even the refusal found room. Nothing is to be cleaned up that needs some.
        os._exit(OUT_OF_MEMORY)


def _outcome(body: bytes, gauge: MemoryGauge) -> bytes:
    """The answer to one task, whatever the file does to its parser short of ending the process."""
    try:
        answer = framed(_done(TASK.decode(body), gauge))
        if len(answer) <= OUTCOME_BYTES_MAX:
            return answer
        refusal = rejected("the document holds more text than one document may", cause="too_large", bytes_max=OUTCOME_BYTES_MAX)
    except DocumentRejected as error:
        # Its trace holds on to all that was read.
        refusal = error.with_traceback(None)
        refusal.__context__ = None
    except MemoryError:
        refusal = rejected("reading the file takes more memory than a document may", cause="too_large")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # Libraries have errors of their own, and panics that are no Exception. The name is for our logs; the message may quote the file.
        refusal = rejected("the file is broken in a way that its parser did not expect", cause="malformed", error=type(error).__name__)
    return framed(Outcome.refusal(refusal, gauge.peak_mib()))


def _done(task: Task, gauge: MemoryGauge) -> Outcome:
    if not task.pages:
        return Outcome.of(read(task.upload()), gauge.peak_mib())
    from services.retrieval.parsers.pdf_text import excerpt

    content, pages = excerpt(task.content, task.pages)
    return Outcome(gauge.peak_mib(), excerpt=content, excerpt_pages=pages)


def _send(outcomes: BinaryIO, frame: bytes) -> None:
    outcomes.write(frame)
    outcomes.flush()


if __name__ == "__main__":
    main()
