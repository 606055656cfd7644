"""Settings: all mistakes at once, secrets masked, nothing but the given environment."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from services.chassis.config import ServiceSettings, SettingsError

KEY = "a-key-of-enough-length"


class Example(ServiceSettings):
    prefix: ClassVar[str] = "TAILRACE_EXAMPLE_"
    port: int = Field(1, ge=0, le=65535, validation_alias="TAILRACE_EXAMPLE_PORT")


def test_every_mistake_is_named_in_one_error() -> None:
    """A wrong value, an unknown variable of ours and a missing secret are all reported together."""
    environ = {"TAILRACE_EXAMPLE_PORT": "70000", "TAILRACE_EXAMPLE_PROT": "1", "TAILRACE_LOG_LEVEL": "loud"}

    with pytest.raises(SettingsError) as caught:
        Example.load(environ)

    text = str(caught.value)
    assert "TAILRACE_EXAMPLE_PORT" in text
    assert "TAILRACE_EXAMPLE_PROT: no such setting" in text
    assert "TAILRACE_LOG_LEVEL" in text


def test_a_missing_internal_key_is_a_mistake() -> None:
    """No service runs with an empty key."""
    with pytest.raises(SettingsError, match="TAILRACE_INTERNAL_KEY"):
        Example.load({})


def test_a_secret_may_come_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    """X_FILE is read, and neither repr nor the description holds the secret."""
    path = tmp_path / "key"
    path.write_text(KEY + "\n")

    settings = Example.load({"TAILRACE_INTERNAL_KEY_FILE": str(path)})

    assert settings.internal_key.get_secret_value() == KEY
    assert KEY not in repr(settings) + settings.described()


def test_an_unreadable_secret_file_is_named(tmp_path: Path) -> None:
    """A missing file is a mistake with its path."""
    with pytest.raises(SettingsError, match="TAILRACE_INTERNAL_KEY_FILE"):
        Example.load({"TAILRACE_INTERNAL_KEY_FILE": str(tmp_path / "nothing")})


def test_settings_do_not_change_after_loading() -> None:
    """They are frozen."""
    settings = Example.load({"TAILRACE_INTERNAL_KEY": KEY})

    with pytest.raises(ValueError, match="frozen"):
        settings.port = 2
