"""Which providers there are, what they are reached by, and which of their keys is used."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.chassis.config import SettingsError
from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelOverloaded
from services.orchestrator.config import OrchestratorSettings
from services.orchestrator.domain import Candidate, Draft, Message, Prompt, ToolSpec
from services.orchestrator.models_file import MODELS_FILE
from services.orchestrator.openai_chat_model import OpenAiChatModel
from services.orchestrator.openai_responses_model import OpenAiResponsesModel
from services.orchestrator.provider_keys import LIMITED_S, REFUSED_S, ProviderKeys, split_keys
from services.orchestrator.providers import PROVIDERS_MAX, Provider, ProvidersInvalid, configured, opened

KEY = {"TAILRACE_INTERNAL_KEY": "an internal key for tests"}


def settings(**variables: str) -> OrchestratorSettings:
    return OrchestratorSettings.load({**KEY, **variables})


def found(path: Path = MODELS_FILE, **variables: str) -> dict[str, Provider]:
    return {provider.name: provider for provider in configured(settings(**variables), path)}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A models file to write to."""
    return tmp_path / "models.toml"


def test_without_a_key_there_is_no_provider() -> None:
    """The suite answers by itself then."""
    assert found() == {}


def test_each_key_brings_its_provider_at_the_usual_address() -> None:
    """Several keys go with commas between."""
    providers = found(ANTHROPIC_API_KEY="a", OPENAI_API_KEY="b, c", GEMINI_API_KEY="d,")

    assert {name: (provider.kind, tuple(provider.keys)) for name, provider in providers.items()} == {
        "anthropic": ("anthropic", ("a",)),
        "openai": ("openai_responses", ("b", "c")),
        "gemini": ("gemini", ("d",)),
    }
    assert "b" not in repr(providers["openai"]).split("base_url")[1].partition("keys")[2]


@pytest.mark.parametrize(
    ("url", "api", "kind"),
    [
        ("https://api.openai.com/v1", "auto", "openai_responses"),
        ("https://eu.api.openai.com/v1", "auto", "openai_responses"),
        ("https://api.openai.com.example.org/v1", "auto", "openai_chat"),
        ("http://127.0.0.1:11434/v1", "auto", "openai_chat"),
        ("https://me.openai.azure.com/openai/v1", "responses", "openai_responses"),
        ("https://api.openai.com/v1", "chat", "openai_chat"),
    ],
)
def test_the_interface_follows_from_the_address_unless_it_is_named(url: str, api: str, kind: str) -> None:
    """OpenAI's own models reason and call tools at once through Responses alone; others speak Chat Completions."""
    assert found(OPENAI_API_KEY="k", OPENAI_BASE_URL=url, TAILRACE_ORCHESTRATOR_OPENAI_API=api)["openai"].kind == kind


def test_a_server_of_ones_own_needs_no_key() -> None:
    """But OpenAI itself does."""
    assert found(OPENAI_BASE_URL="http://127.0.0.1:8000/v1")["openai"].keys == ()
    assert found(OPENAI_BASE_URL="https://api.openai.com/v1") == {}


def test_the_table_adds_providers_with_their_keys_from_the_environment(table: Path) -> None:
    """One whose key is not there is left out; one that wants none is not."""
    table.write_text(
        "[[providers]]\nname='local'\nkind='openai_chat'\nbase_url='http://10.0.0.1:8000/v1'\n"
        "[[providers]]\nname='proxy'\nkind='anthropic'\nbase_url='https://proxy.example'\nkey_variable='PROXY_KEY'\n"
    )
    assert set(found(table)) == {"local"}
    assert found(table, PROXY_KEY="x,y")["proxy"] == Provider("proxy", "anthropic", "https://proxy.example", ("x", "y"))


def test_a_key_of_the_table_may_stand_in_a_file(table: Path, tmp_path: Path) -> None:
    """As every secret may; a file that is not there is a mistake."""
    table.write_text("[[providers]]\nname='proxy'\nkind='anthropic'\nbase_url='https://proxy.example'\nkey_variable='PROXY_KEY'\n")
    (tmp_path / "key").write_text("from-a-file\n")

    assert found(table, PROXY_KEY_FILE=str(tmp_path / "key"))["proxy"].keys == ("from-a-file",)
    with pytest.raises(SettingsError, match="PROXY_KEY_FILE"):
        found(table, PROXY_KEY_FILE=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ("name='openai'\nkind='openai_chat'\nbase_url='http://h/v1'", "openai is taken"),
        ("name='extractive'\nkind='openai_chat'\nbase_url='http://h/v1'", "extractive is taken"),
        ("name='x'\nkind='magic'\nbase_url='http://h/v1'", "kind"),
        ("name='x'\nkind='gemini'\nbase_url='file:///etc/passwd'", "base_url"),
        ("name='x y'\nkind='gemini'\nbase_url='http://h'", "name"),
        ("name='x'\nkind='gemini'\nbase_url='http://h'\nkey='secret'", "key"),
        ("name='x'\nkind='gemini'\nbase_url='http://h'\nkey_variable='a b'", "key_variable"),
        ("kind='gemini'\nbase_url='http://h'", "name"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_the_place(table: Path, row: str, place: str) -> None:
    """Names the file and the key."""
    table.write_text(f"[[providers]]\n{row}\n")
    with pytest.raises(ProvidersInvalid, match=place) as refused:
        found(table)

    assert "models.toml" in str(refused.value)


def test_names_are_given_once_and_not_without_end(table: Path) -> None:
    """Two providers of one name, or too many, are a mistake."""
    row = "[[providers]]\nname='p{}'\nkind='openai_chat'\nbase_url='http://h/v1'\n"
    for rows in ([row.format(1)] * 2, [row.format(n) for n in range(PROVIDERS_MAX + 1)]):
        table.write_text("".join(rows))
        with pytest.raises(ProvidersInvalid):
            found(table)


def test_keys_are_read_from_one_variable() -> None:
    """Spaces and empty places do not count."""
    assert split_keys(" a , b,,c ") == ("a", "b", "c")
    assert split_keys(" , ") == ()


class Time:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(status: int = 401) -> DomainError:
    return ModelMisconfigured(status=status)


def limit(retry_after_ms: int | None = None) -> DomainError:
    return ModelOverloaded(status=429, **({} if retry_after_ms is None else {"retry_after_ms": retry_after_ms}))


def test_a_key_is_used_until_it_is_refused_and_again_after_its_time() -> None:
    """Keys do not take turns: a provider's cache is kept by account."""
    time = Time()
    keys = ProviderKeys(2, time)
    assert [keys.take(), keys.take()] == [0, 0]

    error = refusal()
    keys.note(0, error)
    assert error.metadata["other_key"] == "True"
    assert [keys.take(), keys.take()] == [1, 1]

    time.now += REFUSED_S + 1
    keys.note(1, refusal())
    assert keys.take() == 0


@pytest.mark.parametrize(("asked_ms", "left_alone_s"), [(None, LIMITED_S), (2500, 2.5)])
def test_a_limited_key_is_left_alone_as_long_as_the_provider_asks(asked_ms: int | None, left_alone_s: float) -> None:
    """Another one is used meanwhile."""
    time = Time()
    keys = ProviderKeys(2, time)
    keys.note(0, limit(asked_ms))
    keys.note(keys.take(), limit(60_000))
    time.now += left_alone_s - 0.1
    assert keys.take() == 0  # the one that is free first, although it is not yet
    error = limit(60_000)
    time.now += 0.2
    keys.note(1, error)

    assert error.metadata["other_key"] == "True"
    assert keys.take() == 0


def test_when_all_keys_are_bad_the_one_whose_time_ends_first_is_asked_and_no_other_is_promised() -> None:
    """The provider has the last word; a single key is always asked."""
    keys = ProviderKeys(3, Time())
    errors = [limit(9_000), refusal(), limit(5_000)]
    for number, error in enumerate(errors):
        keys.note(number, error)

    assert keys.take() == 2
    assert ["other_key" in error.metadata for error in errors] == [True, True, False]
    alone, error = ProviderKeys(1, Time()), refusal()
    alone.note(0, error)
    assert (alone.take(), error.metadata.get("other_key")) == (0, None)


@pytest.mark.parametrize("status", [{"status": 401}, {"status": 402}, {"status": 403}, {"status": 400}, {"status": 429}, {}])
def test_a_key_that_is_not_accepted_is_changed_however_that_is_said(status: dict[str, int]) -> None:
    """Gemini answers 400, an account without credit 429; in a stream there is no status."""
    keys, error = ProviderKeys(2, Time()), ModelMisconfigured(**status)
    keys.note(0, error)

    assert keys.take() == 1
    assert error.metadata["other_key"] == "True"


@pytest.mark.parametrize(
    "error",
    [
        *(ModelFailed(), ModelOverloaded(), ModelOverloaded(status=529), ModelOverloaded(status=503)),
        *(ModelMisconfigured(status=404), ModelMisconfigured(status=301), ModelMisconfigured(status=308)),
    ],
)
def test_what_is_not_the_keys_fault_does_not_change_the_key(error: DomainError) -> None:
    """An overload hits all keys alike, and a model that is not there, or an address that has changed, is so for all."""
    keys = ProviderKeys(2, Time())
    keys.note(0, error)

    assert keys.take() == 0
    assert "other_key" not in error.metadata


async def test_each_kind_is_opened_with_its_adapter_under_its_own_name(table: Path) -> None:
    """Errors name the provider as the table does."""
    kinds = ("anthropic", "gemini", "openai_chat", "openai_responses")
    table.write_text("".join(f"[[providers]]\nname='my-{kind}'\nkind='{kind}'\nbase_url='http://127.0.0.1:1'\n" for kind in kinds))
    asked = Prompt("t", "s", (Message("user", "?"),), "?", (), 10)
    async with opened(settings(), table) as models:
        for name, model in models.items():
            with pytest.raises(ModelFailed) as failed:
                await model.generate(asked, Candidate(name, "m", 10, 10), 10, Draft(lambda text: None))
            assert failed.value.metadata == {"provider": name, "cause": "connect"}

    assert [type(model).__name__ for model in models.values()] == ["ClaudeModel", "GeminiModel", "OpenAiChatModel", "OpenAiResponsesModel"]


def test_a_vendors_package_is_imported_only_for_its_provider() -> None:
    """Together they take seconds of a start and a hundred megabytes that an orchestrator without keys does not need."""
    names = "('anthropic', 'openai', 'google.genai')"
    code = f"import sys, services.orchestrator.wiring; print([name for name in {names} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)

    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("url", "bound", "is_openai"),
    [
        ("https://api.openai.com/v1", "max_completion_tokens", True),
        ("https://me.openai.azure.com/openai/v1", "max_completion_tokens", False),
        ("http://127.0.0.1:11434/v1", "max_tokens", False),
        ("https://openai.com.example.org/v1", "max_tokens", False),
    ],
)
async def test_openais_own_words_are_kept_from_servers_that_may_not_know_them(url: str, bound: str, is_openai: bool) -> None:
    """The bound's name, the marks of the cache and the padding of events; old models of OpenAI do not know the marks either."""
    asked, draft = Prompt("t", "s", (Message("user", "?"),), "?", (), 10), Draft(lambda text: None)
    chat = OpenAiChatModel(("k",), url, connect_s=1, first_token_s=1, stall_s=1)
    responses = OpenAiResponsesModel(("k",), url, connect_s=1, first_token_s=1, stall_s=1)
    told = chat.request(asked, Candidate("openai", "m", 10, 10), 7, draft)
    new, old = (responses.request(asked, Candidate("openai", model, 10, 10), 7, draft) for model in ("gpt-6-luna", "gpt-5.5"))
    calling = responses.request(replace(asked, tools=(ToolSpec("t", "", {}),)), Candidate("openai", "gpt-6-luna", 10, 10), 7, draft)
    await chat.aclose()
    await responses.aclose()

    assert told[bound] == 7 and len(told.keys() & {"max_tokens", "max_completion_tokens"}) == 1
    assert ("stream_options" in new, "prompt_cache_options" in new, "prompt_cache_options" in old) == (is_openai, is_openai, False)
    assert ("prompt_cache_breakpoint" in new["input"][0]["content"][0]) == is_openai
    assert "prompt_cache_options" not in calling  # the next round reads all of this one, which OpenAI keeps by itself
