"""Files to text with structure, one module a format; `read` decides which. Pure functions over bytes: no I/O, no store, no embedding.

Everything here may take long and is called in a thread. A file that cannot be read raises DocumentRejected with its `cause`.
"""

from services.retrieval.domain import Extracted, Upload
from services.retrieval.parsers.charset import decoded
from services.retrieval.parsers.detection import HTML, MARKDOWN, media_type_of, refuse_other_formats
from services.retrieval.parsers.html_text import parse_html
from services.retrieval.parsers.markdown_text import parse_markdown
from services.retrieval.parsers.plain_text import parse_plain
from services.retrieval.parsers.rejection import rejected

PARSERS = {HTML: parse_html, MARKDOWN: parse_markdown}


def read(upload: Upload) -> Extracted:
    """Extract the text of a file. Raises DocumentRejected if it is of another format, binary, or has no text."""
    refuse_other_formats(upload)
    text = decoded(upload.content, html=media_type_of(upload, upload.content[:1024].decode("latin-1")) == HTML)
    extracted = PARSERS.get(media_type_of(upload, text), parse_plain)(text)
    if not extracted.text.strip():
        raise rejected("the document has no text", cause="empty")
    return extracted
