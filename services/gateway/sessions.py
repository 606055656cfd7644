"""The routes of a browser's session: a verified token goes into a cookie that no script can read. Nothing is kept on this side."""

from services.chassis import api_key
from services.chassis.errors import NotAuthenticated, RequestInvalid
from services.chassis.principal import Principal
from services.gateway import bodies
from services.gateway.browser import COOKIE_TOKEN_BYTES_MAX
from services.gateway.exchange import Exchange
from services.gateway.identity import credential_in, has_credential
from services.gateway.kit import Kit


async def open_session(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/session: the token of the body, or of the authorization header."""
    exchange.query(())
    kit.browser.check_sign_in(exchange.headers)
    content = await exchange.json()
    token = bodies.parse(content, bodies.SessionBody).token if content else ""
    if token and has_credential(exchange.headers):
        raise NotAuthenticated("the request carries more than one credential", cause="ambiguous")
    token = token or credential_in(exchange.headers)
    if token.startswith(api_key.PREFIX):
        raise RequestInvalid("a session is for a token, not for an API key", field="token")
    if len(token) > COOKIE_TOKEN_BYTES_MAX:
        raise RequestInvalid("the token does not fit a cookie", field="token", bound=f"at most {COOKIE_TOKEN_BYTES_MAX} bytes")
    verified = await kit.identity.verified(token)
    lifetime_s = verified.lifetime_s(kit.identity.now())
    if lifetime_s < 1:
        raise NotAuthenticated("the token has expired", cause="expired")
    await exchange.respond_json(_who(verified.principal), 201, [kit.browser.cookie(token, lifetime_s)])


async def show(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/session"""
    exchange.query(())
    assert exchange.principal is not None
    await exchange.respond_json(_who(exchange.principal))


async def close(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/session: the cookie goes, also one whose token is no longer good."""
    exchange.query(())
    if kit.browser.token_in(exchange.headers):
        kit.browser.check_own(exchange.method, exchange.headers)
    await exchange.respond(204, b"", b"", [kit.browser.no_cookie()])


def _who(principal: Principal) -> dict[str, object]:
    return {
        "tenant": principal.tenant,
        "user": principal.user,
        "roles": sorted(principal.roles),
        "scopes": sorted(principal.scopes),
        "api_key_id": principal.api_key_id,
    }
