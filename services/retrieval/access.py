"""What a caller may see: the one place where a verified principal becomes the bounds of a query. Nothing else makes a `Reach`."""

import re
from dataclasses import dataclass

from services.chassis.errors import NotAuthenticated, RequestInvalid
from services.chassis.principal import Principal
from services.retrieval.domain import DEFAULT_COLLECTION
from services.retrieval.ports import Filter

_COLLECTION = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class Reach:
    """One tenant's collection."""

    tenant: str
    collection: str

    def where(self, **equal: str | int) -> Filter:
        """Points in reach that are also `equal` in these fields. Neither tenant nor collection can be left out or replaced."""
        assert not {"tenant", "collection"} & equal.keys()
        return Filter(self.tenant, equal={"collection": self.collection, **equal})


def tenant_of(principal: Principal) -> str:
    """The tenant whose memory it is. Raises NotAuthenticated for a principal without one: that name is our own records'."""
    if not principal.tenant:
        raise NotAuthenticated("the principal has no tenant", cause="tenant")
    return principal.tenant


def reach_of(principal: Principal, collection: str) -> Reach:
    """Raises RequestInvalid for a name that is none. Empty = the default collection."""
    return Reach(tenant_of(principal), collection_name(collection) or DEFAULT_COLLECTION)


def collection_name(collection: str) -> str:
    """`collection` if it is a name, or empty."""
    if collection and not _COLLECTION.match(collection):
        raise RequestInvalid("a collection's name is 1-64 of letters, digits, _ and -", field="collection", bound="[A-Za-z0-9_-]{1,64}")
    return collection
