"""The signed principal: only what we signed, whole, once and lately."""

import pytest

from services.chassis import passport as module
from services.chassis.errors import NotAuthenticated
from services.chassis.passport import PRINCIPAL_KEY, SIGNATURE_KEY, Passport
from services.chassis.principal import Principal
from tailrace.common.v1 import common_pb2

ALICE = Principal("acme", "alice", frozenset({"user"}))
ours = Passport(b"a-key-of-enough-length")


def test_a_signed_principal_comes_back_as_it_was() -> None:
    """check(sign(p)) == p."""
    assert ours.check(ours.sign(ALICE)) == ALICE


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


def test_text_where_bytes_belong_is_refused() -> None:
    """The metadata names end in -bin."""
    with pytest.raises(NotAuthenticated):
        ours.check([(PRINCIPAL_KEY, "text"), (SIGNATURE_KEY, "text")])
