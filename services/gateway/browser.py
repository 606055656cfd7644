"""What a browser may do here: the cookie that carries a session, the check against forged requests, and other origins' scripts. Pure.

A cookie is sent by the browser whoever made the request, so whatever comes with it must have been made by our own page. Other
origins bring a token in a header or nothing: no cookie is ever asked of or accepted from them.
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from services.chassis.errors import NotAllowed, NotAuthenticated

Headers = list[tuple[bytes, bytes]]

OWN_REQUEST_HEADER = "x-tailrace-request"
"""A form or link of another site cannot set it, and a script of another site is asked for it in a preflight that we refuse."""
COOKIE_TOKEN_BYTES_MAX = 3800
"""Browsers drop a cookie of more than 4096 bytes, name and attributes included."""
PREFLIGHT_AGE_S = 600
OWN_MACHINE = ("localhost", "127.0.0.1", "::1")
"""Between a browser and these nobody can stand, so plain http is as good there; browsers see it so, too."""

ASKED, TOLD, BOTH = "asked", "told", "both"
HEADERS = {
    "accept": ASKED,
    "authorization": ASKED,
    "content-type": ASKED,
    "idempotency-key": ASKED,
    "last-event-id": ASKED,
    "request-timeout": ASKED,
    "traceparent": ASKED,
    "tracestate": ASKED,
    "x-api-key": ASKED,
    "x-request-id": BOTH,
    "allow": TOLD,
    "content-disposition": TOLD,
    "location": TOLD,
    "request-id": TOLD,
    "retry-after": TOLD,
    "www-authenticate": TOLD,
    "x-next-page-token": TOLD,
    "x-ratelimit-limit-reads": TOLD,
    "x-ratelimit-limit-requests": TOLD,
    "x-ratelimit-limit-tokens": TOLD,
    "x-ratelimit-remaining-reads": TOLD,
    "x-ratelimit-remaining-requests": TOLD,
    "x-ratelimit-remaining-tokens": TOLD,
    "x-ratelimit-reset-reads": TOLD,
    "x-ratelimit-reset-requests": TOLD,
    "x-ratelimit-reset-tokens": TOLD,
    "x-should-retry": TOLD,
    "x-trace-id": TOLD,
}
"""Every header that means something to scripts of other origins, in requests, in responses, or in both: browsers hide all others."""
ALLOWED_HEADERS = ", ".join(name for name, way in HEADERS.items() if way != TOLD).encode()
EXPOSED_HEADERS = ", ".join(name for name, way in HEADERS.items() if way != ASKED).encode()
SECURITY_HEADERS: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
]
API_POLICY = (b"content-security-policy", b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
"""Nothing that the API says is a page, whatever a browser takes it for."""
_TRANSPORT = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")


class Browser:
    """The rules for browsers of one gateway. `secure` = it is reached over https alone."""

    def __init__(self, *, secure: bool, origins: Iterable[str] = ()) -> None:
        self._secure = secure
        self._origins = frozenset(origins)
        # The prefix makes browsers refuse such a cookie from a subdomain or over plain http (RFC 6265bis, 4.1.3.2).
        self.cookie_name = "__Host-tailrace" if secure else "tailrace"

    @property
    def security_headers(self) -> Headers:
        """Sent with every response."""
        return [*SECURITY_HEADERS, _TRANSPORT] if self._secure else SECURITY_HEADERS

    # --- the cookie ---

    def cookie(self, token: str, lifetime_s: int) -> tuple[bytes, bytes]:
        """The header that makes a browser keep `token` for `lifetime_s` seconds, out of reach of scripts and other sites."""
        secure = "; Secure" if self._secure else ""
        value = f"{self.cookie_name}={token}; Path=/; Max-Age={lifetime_s}; HttpOnly; SameSite=Strict{secure}"
        return b"set-cookie", value.encode("ascii")

    def no_cookie(self) -> tuple[bytes, bytes]:
        """The header that makes a browser forget it."""
        return self.cookie("", 0)

    def token_in(self, headers: Iterable[tuple[str, str]]) -> str:
        """The token of the session cookie, empty without one. Raises NotAuthenticated if there are several."""
        found = []
        for header, line in headers:
            if header == "cookie":
                for pair in line.split(";"):
                    name, _, value = pair.strip().partition("=")
                    if name == self.cookie_name and value:
                        found.append(value)
        if len(found) > 1:
            raise NotAuthenticated("the request carries more than one session cookie", cause="ambiguous")
        return found[0] if found else ""

    # --- who made the request ---

    def check_own(self, method: str, headers: Iterable[tuple[str, str]]) -> None:
        """Raise NotAllowed unless a request that carries the cookie was made by our own page.

        What changes something must also carry our header, and say where it comes from.
        """
        lines = list(headers)
        named = self._refuse_foreign(lines)
        if method in ("GET", "HEAD"):
            return
        if not named or not any(_values(lines, OWN_REQUEST_HEADER)):
            raise NotAllowed(f"a write with the session cookie needs its origin and the header {OWN_REQUEST_HEADER}", cause="csrf")

    def check_sign_in(self, headers: Iterable[tuple[str, str]]) -> None:
        """Raise NotAllowed if another site tries to sign its visitor in as somebody else."""
        self._refuse_foreign(list(headers))

    def _refuse_foreign(self, headers: list[tuple[str, str]]) -> bool:
        """Raise NotAllowed if the request says that another site made it; return whether it says where it comes from at all.

        `same-site` is foreign too: a subdomain is not us, and neither is our name over plain http where https is the rule.
        """
        sites, origins, hosts = _values(headers, "sec-fetch-site"), _values(headers, "origin"), _values(headers, "host")
        # `none` is an address that a person typed.
        if any(site not in ("same-origin", "none") for site in sites) or not all(self._is_at(origin, hosts) for origin in origins):
            raise NotAllowed("the request was made by another site", cause="csrf")
        return bool(origins) or "same-origin" in sites

    def _is_at(self, origin: str, hosts: list[str]) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        schemes = ("https",) if self._secure and parts.hostname not in OWN_MACHINE else ("http", "https")
        return parts.scheme in schemes and len(hosts) == 1 and parts.netloc.lower() == hosts[0].lower()

    # --- other origins ---

    def cross_origin_headers(self, headers: Iterable[tuple[str, str]]) -> Headers:
        """What lets a script of an allowed origin read a response; for others, nothing."""
        if not self._origins:
            return []
        vary = (b"vary", b"origin")
        if (origin := self._allowed(headers)) is None:
            return [vary]
        return [vary, (b"access-control-allow-origin", origin.encode()), (b"access-control-expose-headers", EXPOSED_HEADERS)]

    def preflight_headers(self, headers: Iterable[tuple[str, str]], methods: Iterable[str]) -> Headers:
        """The answer to a preflight of an allowed origin, besides the above. Raises NotAllowed for another."""
        if self._allowed(headers) is None:
            raise NotAllowed("this origin may not call from a browser", cause="origin")
        return [
            (b"access-control-allow-methods", ", ".join(sorted(methods)).encode()),
            (b"access-control-allow-headers", ALLOWED_HEADERS),
            (b"access-control-max-age", str(PREFLIGHT_AGE_S).encode()),
        ]

    def _allowed(self, headers: Iterable[tuple[str, str]]) -> str | None:
        found = _values(headers, "origin")
        return found[0] if len(found) == 1 and found[0] in self._origins else None


def is_preflight(method: str, headers: Iterable[tuple[str, str]]) -> bool:
    """Whether a browser asks what another origin's script may do."""
    lines = list(headers)
    return method == "OPTIONS" and bool(_values(lines, "origin")) and bool(_values(lines, "access-control-request-method"))


def _values(headers: Iterable[tuple[str, str]], name: str) -> list[str]:
    return [value.strip() for key, value in headers if key == name]
