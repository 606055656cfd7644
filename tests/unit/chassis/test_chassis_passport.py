"""The signed principal: only what we signed, whole, once and lately."""

from dataclasses import replace

import pytest

from services.chassis import passport as module
from services.chassis.errors import NotAllowed, NotAuthenticated
from services.chassis.passport import PRINCIPAL_KEY, SIGNATURE_KEY, Passport
from services.chassis.principal import Principal
from tailrace.common.v1 import common_pb2

ALICE = Principal("acme", "alice", frozenset({"user"}))
ours = Passport(b"a-key-of-enough-length")


@pytest.mark.parametrize("tools", [None, frozenset(), frozenset({"calculator", "github__*"})])
def test_a_signed_principal_comes_back_as_it_was(tools: frozenset[str] | None) -> None:
    """check(sign(p)) == p. A plan without tools is not one that nobody knows."""
    everything = Principal("acme", "alice", frozenset({"user"}), "k", frozenset({"answers"}), frozenset({"g"}), "pro", frozenset({"fast"}))
    for principal in (ALICE, replace(everything, cache_scope="user", tools=tools)):
        assert ours.check(ours.sign(principal)) == principal


@pytest.mark.parametrize(
    ("tools", "allowed"),
    [(None, True), ((), False), (("calculator",), True), (("*",), True), (("files__*",), False), (("calculator__*",), True)],
)
def test_a_plan_has_the_tools_that_it_names(tools: tuple[str, ...] | None, allowed: bool) -> None:
    """By name, by server, or all; nothing is held against somebody whose plan is not known here."""
    principal = replace(ALICE, tools=None if tools is None else frozenset(tools))
    if allowed:
        principal.require_tools(["calculator"])
    else:
        with pytest.raises(NotAllowed):
            principal.require_tools(["calculator"])


def test_another_keys_signature_is_refused() -> None:
    """Nobody without the internal key can make one."""
    with pytest.raises(NotAuthenticated):
        ours.check(Passport(b"another-key-of-length").sign(ALICE))


def test_a_changed_principal_is_refused() -> None:
    """The signature covers every byte."""
    _, signature = ours.sign(ALICE)
    forged = common_pb2.Principal(tenant="other", user="alice", roles=["admin"]).SerializeToString()

    with pytest.raises(NotAuthenticated):
        ours.check([(PRINCIPAL_KEY, forged), signature])


@pytest.mark.parametrize("drop", [0, 1])
def test_half_a_passport_is_refused(drop: int) -> None:
    """Both keys are needed."""
    pairs = list(ours.sign(ALICE))
    del pairs[drop]

    with pytest.raises(NotAuthenticated):
        ours.check(pairs)


def test_two_principals_in_one_call_are_refused() -> None:
    """A doubled key can hide a forgery."""
    with pytest.raises(NotAuthenticated):
        ours.check([*ours.sign(ALICE), *ours.sign(ALICE)])


def test_an_old_principal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stolen one is of little use after five minutes."""
    pairs = ours.sign(ALICE)
    later = module.time.time() + module.MAX_AGE_S + 1
    monkeypatch.setattr(module.time, "time", lambda: later)

    with pytest.raises(NotAuthenticated, match="old"):
        ours.check(pairs)


def test_an_old_principal_is_refused_although_it_was_accepted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of it is that its signature is right, not that it is young."""
    pairs = ours.sign(ALICE)
    assert ours.check(pairs) == ALICE
    later = module.time.time() + module.MAX_AGE_S + 1
    monkeypatch.setattr(module.time, "time", lambda: later)

    with pytest.raises(NotAuthenticated, match="old"):
        ours.check(pairs)


def test_a_signature_is_made_anew_long_before_it_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call twice may share one; one a while later does not, and both are accepted."""
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now)
    first = ours.sign(ALICE)
    assert ours.sign(ALICE) == first
    assert ours.sign(Principal("acme", "alice", frozenset({"admin"}))) != first
    now += module.SIGNED_FOR_S
    second = ours.sign(ALICE)
    assert second != first
    assert ours.check(first) == ours.check(second) == ALICE


def test_a_wrong_signature_stays_wrong_beside_a_right_one() -> None:
    """Neither a right signature nor an earlier refusal is remembered for another one."""
    key, payload = ours.sign(ALICE)[0]
    for _ in range(2):
        with pytest.raises(NotAuthenticated, match="signature"):
            ours.check([(key, payload), (SIGNATURE_KEY, bytes(32))])
        assert ours.check(ours.sign(ALICE)) == ALICE


def test_text_where_bytes_belong_is_refused() -> None:
    """The metadata names end in -bin."""
    with pytest.raises(NotAuthenticated):
        ours.check([(PRINCIPAL_KEY, "text"), (SIGNATURE_KEY, "text")])
