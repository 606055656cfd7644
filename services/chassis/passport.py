"""A principal on the wire: a signed message in gRPC metadata, checked by every service. Nothing here knows tokens or users' keys."""

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


class Passport:
    """Signs and checks principals with the internal key that all services share."""

    def __init__(self, internal_key: bytes) -> None:
        if len(internal_key) < 16:
            raise ValueError("the internal key needs at least 16 bytes")
        self._key = internal_key

    def sign(self, principal: Principal) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
        """Make the two metadata pairs that carry `principal` for the next five minutes."""
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
        message.issued_at.FromMilliseconds(int(time.time() * 1000))
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
        if not isinstance(payload, bytes) or not isinstance(signature, bytes) or not hmac.compare_digest(signature, self._digest(payload)):
            raise NotAuthenticated("the principal's signature is wrong", cause="signature")
        message = common_pb2.Principal.FromString(payload)
        if abs(time.time() - message.issued_at.ToMilliseconds() / 1000) > MAX_AGE_S:
            raise NotAuthenticated("the principal is too old", cause="expired")
        return Principal(
            message.tenant,
            message.user,
            frozenset(message.roles),
            message.api_key_id,
            frozenset(message.scopes),
            frozenset(message.groups),
            message.plan,
            frozenset(message.tiers),
            message.cache_scope,
        )

    def _digest(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, payload, "sha256")
