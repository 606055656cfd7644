"""The command's own decisions: what a path means, how money and a refusal look."""

import contextlib
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from typer.testing import CliRunner

import tailrace
from services.local import command
from services.local.command import app, fact, found, passed_over, printable, usd
from services.orchestrator import spool
from tailrace.ledger.v1 import ledger_service_pb2


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [(0, "0.00 USD"), (1, "0.000000001 USD"), (1_500_000_000, "1.50 USD"), (12_345_000, "0.012345 USD"), (-2_000_000_000, "-2.00 USD")],
)
def test_money_is_shown_exactly(nanousd: int, text: str) -> None:
    """No rounding: what is shown is what is booked."""
    assert usd(nanousd) == text


def test_a_folder_gives_its_documents_under_names_that_stay_apart(tmp_path: Path) -> None:
    """Known types below the folder, by their place in it; hidden ones and others are left out."""
    for name in ("a.md", "sub/a.md", "sub/b.HTML", "c.bin", ".git/d.md", "e.txt"):
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")

    assert [name for name, _ in found([str(tmp_path / "docs")])] == ["docs/a.md", "docs/e.txt", "docs/sub/a.md", "docs/sub/b.HTML"]
    assert passed_over([str(tmp_path / "docs"), str(tmp_path / "docs" / "a.md")]) == 1


def test_a_named_file_is_taken_whatever_it_is_and_only_once(tmp_path: Path) -> None:
    """The service judges it; the same file by two ways is one document."""
    (tmp_path / "x.weird").write_text("text")
    paths = [str(tmp_path / "x.weird"), f"{tmp_path}/*.weird"]

    assert [name for name, _ in found(paths)] == ["x.weird"]


def test_a_pattern_is_expanded_where_the_shell_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted patterns work, `**` included."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.md").write_text("1")
    monkeypatch.chdir(tmp_path)

    assert [name for name, _ in found(["**/*.md"])] == ["a/one.md"]


def test_a_missing_path_is_an_error_not_an_empty_ingestion(tmp_path: Path) -> None:
    """Exit code 1 and the path's name."""
    result = CliRunner().invoke(app, ["ingest", str(tmp_path / "nowhere")], env={"TAILRACE_STATE_DIR": str(tmp_path)})

    assert result.exit_code == 1
    assert "nowhere: no such file or folder" in str(result.exception) + result.output


def test_a_minted_token_says_who_it_is_for(tmp_path: Path) -> None:
    """User, tenant and every role named."""
    arguments = ["token", "--user", "ada", "--tenant", "acme", "--role", "user", "--role", "admin"]
    result = CliRunner().invoke(app, arguments, env={"TAILRACE_STATE_DIR": str(tmp_path / "state")})
    claims = jwt.decode(result.output.strip(), options={"verify_signature": False})

    assert (claims["sub"], claims["tenant"], claims["roles"]) == ("ada", "acme", ["admin", "user"])
    assert stat.S_IMODE((tmp_path / "state" / "dev-key.pem").stat().st_mode) == 0o600


def test_production_mints_no_token(tmp_path: Path) -> None:
    """The development issuer is refused, and no key is made."""
    result = CliRunner().invoke(app, ["token", "--user", "ada"], env={"TAILRACE_STATE_DIR": str(tmp_path), "TAILRACE_ENV": "production"})

    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_role_is_refused(tmp_path: Path) -> None:
    """A typo must not become a token that is good for nothing."""
    result = CliRunner().invoke(app, ["token", "--user", "a", "--role", "root"], env={"TAILRACE_STATE_DIR": str(tmp_path)})

    assert result.exit_code == 2


@pytest.mark.parametrize("arguments", [["--user", ""], ["--user", "ada", "--tenant", " "], ["--user", "ada", "--group", "a\n"]])
def test_a_name_that_no_gateway_takes_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    """The gateway asks the same of the claims, so that the token would be good for nothing."""
    result = CliRunner().invoke(app, ["token", *arguments], env={"TAILRACE_STATE_DIR": str(tmp_path)})

    assert result.exit_code == 2
    assert "printable" in result.output


def test_doctor_names_every_mistake_in_the_settings(tmp_path: Path) -> None:
    """Exit code 1, the variable and no traceback."""
    result = CliRunner().invoke(app, ["doctor"], env={"TAILRACE_STATE_DIR": str(tmp_path), "TAILRACE_HTTP_PORT": "many"})

    assert result.exit_code == 1
    assert "TAILRACE_HTTP_PORT" in result.output


def test_doctor_says_that_a_key_is_there_and_not_what_it_is(tmp_path: Path) -> None:
    """Secrets are not printed."""
    secret = "sk-ant-secret"
    result = CliRunner().invoke(app, ["doctor"], env={"TAILRACE_STATE_DIR": str(tmp_path), "ANTHROPIC_API_KEY": secret})

    assert "ANTHROPIC_API_KEY set" in result.output
    assert secret not in result.output


def test_dead_letters_are_shown_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, with whose it is and why it was refused; then none is left."""
    (tmp_path / "orchestrator").mkdir()
    payload = ledger_service_pb2.Operation(operation_id="o-1", tenant="acme", user="ada").SerializeToString()
    with contextlib.closing(spool._open(tmp_path / "orchestrator" / "spool.db")) as database:
        database.execute(
            "INSERT INTO dead_letter (record_id, payload, reason, detail) VALUES (1, ?, 'PRICE_UNKNOWN', 'no price')", (payload,)
        )
    monkeypatch.setenv("TAILRACE_STATE_DIR", str(tmp_path))
    shown, moved, after = (CliRunner().invoke(app, ["ledger", "dead-letters", *more]).output for more in ([], ["--retry"], []))

    assert shown.split()[1:] == ["acme/ada", "o-1", "PRICE_UNKNOWN:", "no", "price"]
    assert moved == "1 put back into the outbox\n"
    assert after == ""


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("year=2024", ("year", 2024.0)),
        ("rate=-1.5e3", ("rate", -1500.0)),
        ("draft=true", ("draft", True)),
        ('year="2024"', ("year", "2024")),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
        ("a=[1]", ("a", "[1]")),
        ("a=null", ("a", "null")),
        ("a=NaN", ("a", "NaN")),
        ("a=1" + "0" * 400, ("a", "1" + "0" * 400)),
    ],
)
def test_a_fact_is_what_it_looks_like(text: str, pair: tuple[str, Any]) -> None:
    """Numbers and booleans, quoted what looks like one and is text, and everything else as it stands."""
    assert pair == fact(text)
    assert type(pair[1]) is type(fact(text)[1])


class Recording:
    """A client that remembers what it was asked, and finds one passage."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def __aenter__(self) -> "Recording":
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def search(self, query: str, **asked: Any) -> AsyncIterator[tailrace.Hit]:
        self.asked.append((query, asked))
        yield tailrace.Hit(1, "d", "c", "T\x1b[2J", "t.pdf", "one\n\x1b]0;two\x07", 0, 7, 0.5, ("H",), 3, ("override",))

    async def answer(self, question: str, **asked: Any) -> AsyncIterator[tailrace.Event]:
        self.asked.append((question, asked))
        yield tailrace.Passages((tailrace.Passage(1, "d", "c", "T\x1b[2J", "t.pdf", "one", 0, 3, 0.5),))
        yield tailrace.Delta("one\x1b]0;two\x07\n\tthree\x9b2J [1]")
        yield tailrace.Citation(1, 11, 14, "d", "c")
        yield tailrace.Step("generate", "done", 0.0, 1.0)
        verdict = tailrace.CacheVerdict("miss", "", None, None, 0)
        yield tailrace.Receipt("a", "", tailrace.Usage(), 0, "m", "p", "fast", "end_turn", "passed", verdict, "t", False, 1.0, 2.0)

    async def ingest(self, *uploads: tailrace.Upload, collection: str) -> AsyncIterator[tailrace.Progress]:
        self.asked.append((uploads, collection))
        for index, upload in enumerate(uploads):
            yield tailrace.Progress("j", index, upload.name, "d", "indexed", 1, 1, 1, "", "")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    client = Recording()
    monkeypatch.setattr(command, "connected", lambda: client)
    return client


def test_a_search_shows_title_page_and_score_and_nothing_that_a_terminal_obeys(recording: Recording) -> None:
    """Collections and facts become conditions of the one search."""
    arguments = ["search", "q", "--collection", "a", "--collection", "b", "--metadata", "year=2024", "--metadata", "draft=false"]
    shown = CliRunner().invoke(app, arguments)
    ((query, asked),) = recording.asked

    assert ("q", "a", ["b"]) == (query, asked["collection"], asked["more_collections"])
    assert [tailrace.Condition("year", (2024.0,)), tailrace.Condition("draft", (False,))] == asked["metadata"]
    assert shown.output == "[1] 0.500  T [2J › H  p. 3  ! override\n    one ]0;two\n"


def test_a_search_as_json_is_one_line_a_hit(recording: Recording) -> None:
    """With the fields that the client gives."""
    (line,) = CliRunner().invoke(app, ["search", "q", "--json"]).output.splitlines()

    assert ("t.pdf", 3, None) == tuple(json.loads(line)[name] for name in ("source_uri", "page", "explanation"))
    assert recording.asked[0][1]["explain"]


@pytest.mark.parametrize(
    "arguments", [["search", "q", "--mode", "best"], ["search", "q", "--metadata", "year"], ["search", "q", "--metadata", "=1"]]
)
def test_a_search_that_cannot_be_is_refused_before_it_is_sent(recording: Recording, arguments: list[str]) -> None:
    """Exit code 2, as of every wrong argument."""
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert recording.asked == []


def test_an_answer_holds_nothing_that_a_terminal_obeys(recording: Recording) -> None:
    """A model writes what documents and pages tell it to; its lines and tabs stay."""
    shown = CliRunner().invoke(app, ["ask", "q"])

    assert "one]0;two\n\tthree2J [1]\n" == shown.stdout
    assert "  [1] T [2J\n" in shown.stderr


def test_a_step_that_ends_after_text_has_a_line_of_its_own(recording: Recording) -> None:
    """Text and steps go to one terminal; the answer itself gets no line that it has not."""
    shown = CliRunner().invoke(app, ["ask", "q", "--steps"])

    assert "[1]\n  generate       1.0 ms" in shown.output
    assert "one]0;two\n\tthree2J [1]\n" == shown.stdout


def test_documents_are_filed_with_what_was_said_of_them(recording: Recording, tmp_path: Path) -> None:
    """Readers and facts go with every document; without readers, who may read it is left as it is."""
    (tmp_path / "a.md").write_text("a")
    said = ["--user", "ann", "--group", "crew", "--group", "office", "--metadata", "year=2024"]
    results = [CliRunner().invoke(app, ["ingest", str(tmp_path / "a.md"), *more]) for more in (said, [])]
    limited, plain = (uploads[0] for uploads, _ in recording.asked)

    assert [0, 0] == [result.exit_code for result in results]
    assert (tailrace.Access(("ann",), ("crew", "office")), {"year": 2024.0}) == (limited.access, limited.metadata)
    assert (None, {}) == (plain.access, plain.metadata)


def test_what_documents_hold_stays_on_its_line() -> None:
    """No control or bidirectional sign is left."""
    assert printable("a\r\n\tb\u202e\x1b[31mc\x00") == "a b [31mc"


def test_folders_give_what_the_service_reads(tmp_path: Path) -> None:
    """Every format and language it knows by a name, but logs, which grow; and nothing that it does not know."""
    from services.retrieval.parsers import detection, source_code

    known = {f"x{suffix}" for suffix in detection.BY_EXTENSION.keys() | source_code.BY_EXTENSION.keys()} | source_code.BY_NAME.keys()
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in known | {"x.bin", "x", "README", "x.md.bak"}:
        (folder / name).write_text("text")
    (folder / "Upper.PY").write_text("text")
    (folder / "sub").mkdir()
    (folder / "sub" / "Dockerfile").write_text("text")

    assert {name.removeprefix("docs/") for name, _ in found([str(folder)])} == known - {"x.log"} | {"Upper.PY", "sub/Dockerfile"}
    assert {"x.py", "x.go", "x.js", "x.yaml", "makefile"} <= known


def test_what_others_wrote_is_not_taken_from_a_folder_of_code(tmp_path: Path) -> None:
    """Packages and what is made from code stay out, wherever they lie."""
    for name in ("a.py", "web/node_modules/b/c.js", "venv/lib/site-packages/d.py", "__pycache__/e.py"):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")

    assert [name for name, _ in found([str(tmp_path / "code")])] == ["code/a.py"]
