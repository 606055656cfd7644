"""The command's own decisions: what a path means, how money and a refusal look."""

import contextlib
import stat
from pathlib import Path

import jwt
import pytest
from typer.testing import CliRunner

from services.local.command import app, found, passed_over, usd
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
