"""Where a fetch on behalf of somebody else may go: to hosts that are listed, at public addresses, however they are spelled. Pure."""

import ipaddress
import re
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Everything the IANA special-purpose registries hold that is not plainly reachable from everywhere, written out: what Python calls
# global has changed between its versions.
_INSIDE = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("::/96", "100::/64", "100:0:0:1::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10"),
        *("fec0::/10", "ff00::/8"),
    )
)
# Cloud platforms answer here with credentials, although the address is a public one.
_METADATA = frozenset(map(ipaddress.ip_address, ("168.63.129.16", "100.100.100.200", "169.254.169.254", "fd00:ec2::254")))
# Prefixes with an IPv4 address inside, and how far it lies from the right end, in bits: mapped, NAT64, 6to4. Teredo is refused whole.
_CARRIERS = (
    (ipaddress.ip_network("::ffff:0:0/96"), 0),
    (ipaddress.ip_network("::ffff:0:0:0/96"), 0),
    (ipaddress.ip_network("64:ff9b::/96"), 0),
    (ipaddress.ip_network("2002::/16"), 80),
)
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_HOST = re.compile(r"(?:(?P<scheme>https?)://)?(?P<any>\*\.)?(?P<host>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::(?P<port>\d{1,5}))?")


def is_public(address: str) -> bool:
    """Whether `address`, as a resolver gives it, may be connected to. What cannot be read may not."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return _is_public(parsed)


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None or address in _LOCAL_NAT64:
            return False
        for network, shift in _CARRIERS:
            if address in network:
                return _is_public(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
        if address not in ipaddress.ip_network("2000::/3"):
            return False
    if address in _METADATA or any(address.version == network.version and address in network for network in _INSIDE):
        return False
    return address.is_global and not address.is_multicast


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """A host that may be fetched from, by one scheme and port."""

    scheme: str
    host: str
    port: int
    below: bool
    """Whether it stands for the names below it instead of itself."""

    def covers(self, scheme: str, host: str, port: int | None) -> bool:
        fits = host.endswith("." + self.host) if self.below else host == self.host
        return fits and scheme == self.scheme and port == self.port


def parse_hosts(text: str) -> tuple[AllowedHost, ...]:
    """Read `example.com, *.example.org, http://intranet.example:8080`; https and its port unless it is said. Raises ValueError."""
    found = []
    for entry in filter(None, (part.strip().lower() for part in text.split(","))):
        match = _HOST.fullmatch(entry)
        if match is None or not 0 < int(match["port"] or 1) < 65_536 or (match["any"] and "." not in match["host"]):
            raise ValueError(f"not a host to fetch from: {entry[:80]!r}; write example.com, *.example.com or http://example.com:8080")
        scheme = match["scheme"] or "https"
        port = int(match["port"] or (443 if scheme == "https" else 80))
        found.append(AllowedHost(scheme, match["host"], port, bool(match["any"])))
    return tuple(found)
