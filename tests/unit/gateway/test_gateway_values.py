"""Small pure parts of the edge: money, problems, routes, queries, figures, settings."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chassis import errors
from services.chassis.config import SettingsError
from services.chassis.errors import DomainError, RequestInvalid
from services.gateway import problems, queries, usd
from services.gateway.app import ROUTES, Router
from services.gateway.config import Settings
from services.gateway.metrics import RECENT_S, Hop

ENVIRONMENT = {"TAILRACE_INTERNAL_KEY": "0123456789abcdef"}


@given(st.integers(0, 10**18 - 1))
def test_money_goes_out_and_comes_back_exactly(nanousd: int) -> None:
    """Whole nano-USD in decimal dollars, without a float."""
    assert usd.parse(usd.render(nanousd)) == nanousd


def test_money_has_at_least_two_places() -> None:
    """As people write it."""
    assert [usd.render(amount) for amount in (0, 1, 1_500_000_000, -2_500_000)] == ["0.00", "0.000000001", "1.50", "-0.0025"]
    for text in ("", ".5", "1.", "-1", "+1", "1e3", "1_0", "١", " 1", "1\n"):
        with pytest.raises(ValueError, match="decimal"):
            usd.parse(text)


@pytest.mark.parametrize("cls", [*errors.leaves().values(), problems.MethodNotAllowed, problems.MediaTypeUnsupported])
def test_every_error_has_a_status_and_a_document(cls: type[DomainError]) -> None:
    """By its code; a 500 only where it is our fault."""
    status = problems.status_of(cls())
    document = problems.document(cls(), trace_id="t", request_id="r")

    assert 400 <= status <= 599
    assert (status == 500) == (cls.code in ("INTERNAL", "UNKNOWN", "DATA_LOSS"))
    assert document["type"] == f"/problems/{cls.reason.lower().replace('_', '-')}"
    assert (document["status"], document["reason"], document["retryable"]) == (status, cls.reason, cls.retryable)


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (errors.ModelRefused, 422),
        (errors.ModelFailed, 502),
        (errors.OutputInvalid, 502),
        (errors.ModelStalled, 504),
        (errors.ModelOverloaded, 503),
        (errors.Overloaded, 503),
        (errors.Unavailable, 503),
    ],
)
def test_what_a_provider_did_is_told_apart_from_what_we_cannot(cls: type[DomainError], status: int) -> None:
    """A bad gateway is one whose provider failed or wrote what is of no use (RFC 9110, 15.6.3): the service itself is there."""
    assert problems.status_of(cls()) == status


def test_metadata_never_overwrites_the_documents_own_members() -> None:
    """A service cannot make a problem say it is another."""
    error = errors.ModelRefused("refused", status="200", type="x", provider="p")

    document = problems.document(error, trace_id="t", request_id="r")

    assert (document["status"], document["type"], document["provider"]) == (422, "/problems/model-refused", "p")


def test_when_to_come_back_is_said_in_whole_seconds() -> None:
    """Rounded up; and not at all where coming back does not help."""
    limited = dict(problems.headers_of(errors.RateLimited(retry_after_ms=1200)))
    broke = dict(problems.headers_of(errors.BudgetExhausted()))

    assert limited[b"retry-after"] == b"2"
    assert (broke.get(b"retry-after"), broke[b"x-should-retry"]) == (None, b"false")


def test_every_route_finds_itself() -> None:
    """No route hides another."""
    router = Router(ROUTES)
    for route in ROUTES:
        path = route.path.replace("{scope}", "user")
        found, _ = router.find(route.method, path.replace("{", "x").replace("}", "y").encode())

        assert found is route


def test_an_encoded_slash_stays_inside_its_segment() -> None:
    """The path is cut before it is decoded."""
    _, params = Router(ROUTES).find("GET", b"/v1/admin/budgets/user/a%2Fb%20%C3%A4")

    assert params == {"scope": "user", "id": "a/b ä"}


@pytest.mark.parametrize("value", ["2026-1-1", "20260101", "2026-02-30", "2026-01-01T10:00", "now", "9999-99-99", "0000-01-01", "1" * 99])
def test_a_time_is_a_date_or_has_an_offset(value: str) -> None:
    """Anything else names the bound."""
    with pytest.raises(RequestInvalid) as caught:
        queries.at(value, "from")

    assert "RFC 3339" in caught.value.metadata["bound"]


def test_percentiles_are_of_the_recent_calls() -> None:
    """By nearest rank; old ones count no more."""
    now = 0.0
    hop = Hop("a", "b", clock=lambda: now)
    assert hop.percentiles() == (None, None)
    for milliseconds in range(1, 101):
        hop.observe(float(milliseconds), failed=milliseconds > 98)

    assert hop.percentiles() == (50.0, 95.0)
    assert (hop.requests, hop.errors) == (100, 2)
    now = RECENT_S + 1
    hop.observe(7.0, failed=False)
    assert hop.percentiles() == (7.0, 7.0)


PRODUCTION = {"TAILRACE_ENV": "production", "TAILRACE_JWT_ISSUER": "https://id.example.org"}


@pytest.mark.parametrize(
    ("environment", "mistake"),
    [
        ({"TAILRACE_ENV": "production"}, "tailrace-dev"),
        ({"TAILRACE_ENV": "production", "TAILRACE_JWT_ISSUER": "https://id.example.org"}, "TAILRACE_JWKS_URL"),
        ({"TAILRACE_JWT_HS256_SECRET": "too short"}, "32 bytes"),
        ({"TAILRACE_JWKS_URL": "file:///etc/passwd"}, "TAILRACE_JWKS_URL"),
        ({"TAILRACE_JWKS_URL": "https://a/b", "TAILRACE_JWKS_FILE": "/c"}, "exclude"),
        ({**PRODUCTION, "TAILRACE_JWKS_URL": "http://id.example.org/jwks"}, "TAILRACE_JWKS_URL"),
        ({**PRODUCTION, "TAILRACE_JWKS_URL": "http://127.0.0.1.example.org/jwks"}, "TAILRACE_JWKS_URL"),
        ({**PRODUCTION, "TAILRACE_JWKS_URL": "http://localhost@example.org/jwks"}, "TAILRACE_JWKS_URL"),
        ({"TAILRACE_JWT_LEEWAY_S": "61"}, "TAILRACE_JWT_LEEWAY_S"),
        ({"TAILRACE_GATEWAY_PROT": "1"}, "TAILRACE_GATEWAY_PROT"),
    ],
)
def test_settings_that_would_open_the_door_are_refused(environment: dict[str, str], mistake: str) -> None:
    """At the start, by name."""
    with pytest.raises(SettingsError, match=mistake):
        Settings.load({**ENVIRONMENT, **environment})


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/jwks", "http://[::1]/jwks", "http://localhost:8081/jwks", "https://id.example.org/jwks"]
)
def test_keys_come_in_the_clear_only_from_this_machine(url: str) -> None:
    """Whoever can change them on the way can sign as anybody. A sidecar on the same machine may speak plainly."""
    assert Settings.load({**ENVIRONMENT, **PRODUCTION, "TAILRACE_JWKS_URL": url}).jwks_url == url
    assert Settings.load({**ENVIRONMENT, "TAILRACE_JWKS_URL": "http://id.example.org/jwks"}).jwks_url


def test_keys_come_from_the_state_directory_only_in_development() -> None:
    """Unless told otherwise."""
    development = Settings.load({**ENVIRONMENT, "TAILRACE_STATE_DIR": "/state"})
    production = Settings.load(
        {**ENVIRONMENT, "TAILRACE_ENV": "production", "TAILRACE_JWT_ISSUER": "i", "TAILRACE_JWKS_URL": "https://id.example.org/jwks"}
    )
    secret = Settings.load({**ENVIRONMENT, "TAILRACE_JWT_HS256_SECRET": "s" * 32})

    assert development.jwks_file == Path("/state/dev-jwks.json")
    assert (production.jwks_file, secret.jwks_file) == (None, None)
    assert "s" * 32 not in secret.described()
