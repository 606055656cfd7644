"""A principal on the wire: a signed message in gRPC metadata, checked by every service. Nothing here knows tokens or users' keys."""

import functools
import hmac
import time
from collections.abc import Iterable

from services.chassis.errors import NotAuthenticated
from services.chassis.principal import Principal
from tailrace.common.v1 import common_pb2

PRINCIPAL_KEY = "x-tailrace-principal-bin"
SIGNATURE_KEY = "x-tailrace-signature-bin"
MAX_AGE_S = 300
"""Long enough for any clock difference between our machines, short enough that a stolen one is of little use."""
SIGNED_FOR_S = 10
"""How long the same principal goes with the same signature: one answer takes half a dozen calls."""
KEPT_MAX = 4096
"""Principals whose signatures are remembered, each way."""

_Pairs = tuple[tuple[str, bytes], tuple[str, bytes]]


class Passport:
    """Signs and checks principals with the internal key that all services share."""

    def __init__(self, internal_key: bytes) -> None:
        if len(internal_key) < 16:
            raise ValueError("the internal key needs at least 16 bytes")
        self._key = internal_key
        self._signed = functools.lru_cache(KEPT_MAX)(self._sign)
        self._verified = functools.lru_cache(KEPT_MAX)(self._verify)  # what is refused raises, and is not kept

    def sign(self, principal: Principal) -> _Pairs:
        """The two metadata pairs that carry `principal` for the next five minutes, or a few seconds less."""
        return self._signed(principal, int(time.time() // SIGNED_FOR_S * SIGNED_FOR_S))

    def _sign(self, principal: Principal, issued_at_s: int) -> _Pairs:
        message = common_pb2.Principal(
            tenant=principal.tenant,
            user=principal.user,
            roles=sorted(principal.roles),
            api_key_id=principal.api_key_id,
            scopes=sorted(principal.scopes),
            groups=sorted(principal.groups),
            plan=principal.plan,
            tiers=sorted(principal.tiers),
            cache_scope=principal.cache_scope,
        )
        if principal.tools is not None:
            message.tools.names.extend(sorted(principal.tools))
            message.tools.SetInParent()
        message.issued_at.FromSeconds(issued_at_s)
        payload = message.SerializeToString(deterministic=True)
        return (PRINCIPAL_KEY, payload), (SIGNATURE_KEY, self._digest(payload))

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> Principal:
        """Return the principal in `metadata`. Raises NotAuthenticated if it is missing, doubled, forged or too old."""
        payloads, signatures = [], []
        for key, value in metadata:
            if key == PRINCIPAL_KEY:
                payloads.append(value)
            elif key == SIGNATURE_KEY:
                signatures.append(value)
        if len(payloads) != 1 or len(signatures) != 1:
            raise NotAuthenticated("the call carries no principal", cause="missing")
        payload, signature = payloads[0], signatures[0]
        if not isinstance(payload, bytes) or not isinstance(signature, bytes):
            raise NotAuthenticated("the principal's signature is wrong", cause="signature")
        principal, issued_at_s = self._verified(payload, signature)
        if abs(time.time() - issued_at_s) > MAX_AGE_S:
            raise NotAuthenticated("the principal is too old", cause="expired")
        return principal

    def _verify(self, payload: bytes, signature: bytes) -> tuple[Principal, float]:
        """The principal, and when it was signed. Raises NotAuthenticated."""
        if not hmac.compare_digest(signature, self._digest(payload)):
            raise NotAuthenticated("the principal's signature is wrong", cause="signature")
        message = common_pb2.Principal.FromString(payload)
        principal = Principal(
            message.tenant,
            message.user,
            frozenset(message.roles),
            message.api_key_id,
            frozenset(message.scopes),
            frozenset(message.groups),
            message.plan,
            frozenset(message.tiers),
            message.cache_scope,
            frozenset(message.tools.names) if message.HasField("tools") else None,
        )
        return principal, message.issued_at.ToMilliseconds() / 1000

    def _digest(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, payload, "sha256")
