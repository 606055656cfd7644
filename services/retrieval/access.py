"""What a caller may see: the one place where a verified principal becomes the bounds of a query.

Nothing else makes a `Viewer` or a `Reach`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.chassis.errors import NotAuthenticated, RequestInvalid
from services.chassis.principal import Principal
from services.retrieval.domain import DEFAULT_COLLECTION, Access, Viewer
from services.retrieval.facts import Condition
from services.retrieval.ports import Filter

_COLLECTION = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_USER, _GROUP = "user:", "group:"


@dataclass(frozen=True, slots=True)
class Reach:
    """One tenant's collection, as one of its users sees it, or several of them."""

    viewer: Viewer
    collection: str
    more: tuple[str, ...] = ()
    """Collections that are searched together with it."""

    @property
    def tenant(self) -> str:
        return self.viewer.tenant

    @property
    def collections(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((self.collection, *self.more)))

    def where(self, *, document_ids: tuple[str, ...] = (), facts: tuple[Condition, ...] = (), **equal: str | int) -> Filter:
        """Points in reach that are also `equal` in these fields, of these documents (empty = of all) and of such metadata.

        Neither tenant, readers nor collection can be left out or replaced.
        """
        assert not {"tenant", "collection", "readers"} & equal.keys()
        any_of = {"collection": self.collections} if self.more else {}
        return Filter(
            self.viewer.tenant,
            equal=equal if self.more else {"collection": self.collection, **equal},
            any_of={**any_of, "document_id": document_ids} if document_ids else any_of,
            readers=self.viewer.readers,
            facts=facts,
        )


def tenant_of(principal: Principal) -> str:
    """The tenant whose memory it is. Raises NotAuthenticated for a principal without one: that name is our own records'."""
    if not principal.tenant:
        raise NotAuthenticated("the principal has no tenant", cause="tenant")
    return principal.tenant


def viewer_of(principal: Principal) -> Viewer:
    """Admins and services see all documents of their tenant; a user sees those limited to them or to one of their groups, too."""
    if principal.roles & {"admin", "service"}:
        return Viewer(tenant_of(principal), None)
    return Viewer(tenant_of(principal), (_USER + principal.user, *(_GROUP + group for group in sorted(principal.groups))))


def everything_of(tenant: str) -> Viewer:
    """For our own work on a tenant's documents, which nobody's reading limits."""
    return Viewer(tenant, None)


def reach_of(principal: Principal, collection: str, more: Sequence[str] = ()) -> Reach:
    """Raises RequestInvalid for a name that is none. Empty = the default collection."""
    others = tuple(collection_name(name, f"more_collections[{place}]") or DEFAULT_COLLECTION for place, name in enumerate(more))
    return Reach(viewer_of(principal), collection_name(collection) or DEFAULT_COLLECTION, others)


def collection_name(collection: str, field: str = "collection") -> str:
    """`collection` if it is a name, or empty."""
    if collection and not _COLLECTION.match(collection):
        raise RequestInvalid("a collection's name is 1-64 of letters, digits, _ and -", field=field, bound="[A-Za-z0-9_-]{1,64}")
    return collection


def readers_of(access: Access, uploader: Viewer) -> tuple[str, ...]:
    """The names a document limited to `access` is kept under. Its uploader is among them; empty = everybody in the tenant."""
    if not access.users and not access.groups:
        return ()
    own = (uploader.readers or ())[:1]  # who reads everything needs no mention
    return tuple(sorted({*own, *(_USER + user for user in access.users), *(_GROUP + group for group in access.groups)}))


def access_of(readers: Iterable[str]) -> Access:
    """What `readers_of` made the names from."""
    names = sorted(readers)
    return Access(
        users=tuple(name.removeprefix(_USER) for name in names if name.startswith(_USER)),
        groups=tuple(name.removeprefix(_GROUP) for name in names if name.startswith(_GROUP)),
    )
