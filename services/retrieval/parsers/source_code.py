"""Source code: kept line by line, in blocks that begin at definitions of the outermost level, each under its name. No grammar is known."""

import re

from services.retrieval.domain import Block, BlockKind, Extracted

BY_EXTENSION = {
    extension: language
    for language, extensions in {
        "python": ".py .pyi .pyw",
        "javascript": ".js .mjs .cjs .jsx",
        "typescript": ".ts .mts .cts .tsx",
        "java": ".java",
        "kotlin": ".kt .kts",
        "scala": ".scala",
        "c": ".c .h",
        "c++": ".cc .cpp .cxx .hh .hpp .hxx",
        "csharp": ".cs",
        "go": ".go",
        "rust": ".rs",
        "swift": ".swift",
        "ruby": ".rb",
        "php": ".php",
        "perl": ".pl .pm",
        "lua": ".lua",
        "r": ".r",
        "julia": ".jl",
        "haskell": ".hs",
        "elixir": ".ex .exs",
        "erlang": ".erl",
        "clojure": ".clj",
        "dart": ".dart",
        "shell": ".sh .bash .zsh .fish",
        "powershell": ".ps1",
        "sql": ".sql",
        "css": ".css .scss .less",
        "yaml": ".yaml .yml",
        "toml": ".toml",
        "ini": ".ini .cfg .conf .properties",
        "protobuf": ".proto",
        "terraform": ".tf",
        "cmake": ".cmake",
        "tex": ".tex",
        "vue": ".vue",
        "svelte": ".svelte",
    }.items()
    for extension in extensions.split()
}
BY_NAME = {"makefile": "make", "gnumakefile": "make", "dockerfile": "docker", "containerfile": "docker", "cmakelists.txt": "cmake"}
MEDIA_TYPE_PREFIX = "text/x-"

BLOCK_LINES_MAX = 400
"""A definition longer than this is cut; chunks are far smaller anyway."""

_SHEBANG = re.compile(r"#!\s*(?:\S*/env(?:\s+-S)?\s+)?(?:\S*/)?([a-z]+)")
_INTERPRETERS = {
    "python": "python", "pypy": "python", "node": "javascript", "deno": "typescript", "sh": "shell", "bash": "shell", "zsh": "shell",
    "dash": "shell", "ksh": "shell", "fish": "shell", "ruby": "ruby", "perl": "perl", "php": "php", "lua": "lua", "julia": "julia",
}  # fmt: skip
_NAME = r"([A-Za-z_$][\w$]{0,100})"
_DEFINITION = re.compile(
    rf"(?:(?:export|default|public|private|protected|internal|static|final|abstract|async|pub(?:\([a-z]+\))?|unsafe|sealed|data|open)\s+){{0,5}}"
    rf"(?:class|def|function\*?|fn|func|struct|enum|interface|trait|impl|module|namespace|type|record|object|protocol|message|service)\s+{_NAME}"
)


def language_of(name: str, extension: str, text: str) -> str:
    """The language by the file's name, else by its first line; empty = no source code that is known."""
    if found := BY_NAME.get(name.lower()) or BY_EXTENSION.get(extension):
        return found
    shebang = _SHEBANG.match(text[:200])
    return _INTERPRETERS.get(shebang[1], "") if shebang else ""


def parse_code(text: str, language: str) -> Extracted:
    """The extracted text is the file's own."""
    blocks: list[Block] = []
    lines = text.split("\n")
    starts = [number for number in range(len(lines)) if _begins(lines, number)]
    place, begin = 0, 0
    offsets = []
    for line in lines:
        offsets.append(place)
        place += len(line) + 1
    cuts = {0, *starts}
    for number in range(len(lines) + 1):
        if number < len(lines) and number not in cuts and number - begin < BLOCK_LINES_MAX:
            continue
        stretch = "\n".join(lines[begin:number])
        if stretch.strip():
            start = offsets[begin] + len(stretch) - len(stretch.lstrip("\n"))
            blocks.append(Block(BlockKind.CODE, start, offsets[begin] + len(stretch.rstrip()), _named(lines[begin:number])))
        begin = number
    return Extracted(text, tuple(blocks), MEDIA_TYPE_PREFIX + language)


def _begins(lines: list[str], number: int) -> bool:
    """Whether a stretch of its own begins here: at the margin, after an empty line, and not with what only closes."""
    line = lines[number]
    return bool(line) and not line[0].isspace() and line[0] not in ")}]" and number > 0 and not lines[number - 1].strip()


def _named(lines: list[str]) -> tuple[str, ...]:
    """The name of what is defined there, if its first lines say so; decorators and comments may stand above."""
    for line in lines[:20]:
        if found := _DEFINITION.match(line):
            return (found[1],)
    return ()
