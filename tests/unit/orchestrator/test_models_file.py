"""What is told of a models file that changes while it is used."""

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.orchestrator import providers
from services.orchestrator.models_file import read_table, reload_forever, tell_left_out
from services.orchestrator.router import Router, Wish
from tests.fakes.orchestrator_world import until

ROW = "context_tokens_max = 1000\noutput_tokens_max = 100\n"
BEFORE = f"""[tiers.fast]
models = ["extractive"]
[[models]]
model = "extractive"
provider = "extractive"
{ROW}"""
MINE = f"""[[models]]
model = "mine"
provider = "local"
{ROW}"""
PROVIDER = """[[providers]]
name = "local"
kind = "openai_chat"
base_url = "http://127.0.0.1:8000/v1"
"""


async def told_of(path: Path, content: str) -> list[MutableMapping[str, Any]]:
    """What the log says once the file has become `content`."""
    path.write_text(BEFORE)
    router = Router(read_table(path), {"extractive"}, "fast", lambda: 0.0)
    with capture_logs() as lines:
        watching = asyncio.create_task(reload_forever(router, path, providers.names_in, look_s=0.001))
        await asyncio.sleep(0)
        path.write_text(content)
        await until(lambda: lines)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert router.route(Wish()).candidates
    return lines


async def test_models_of_a_provider_that_is_new_are_said_to_wait_for_a_restart(tmp_path: Path) -> None:
    """They do not vanish without a word."""
    adopted, left_out = await told_of(tmp_path / "models.toml", BEFORE + MINE + PROVIDER)

    assert adopted["event"] == "models_file_adopted"
    assert (left_out["event"], left_out["log_level"], left_out["models"], left_out["provider"]) == (
        "models_left_out",
        "warning",
        "mine",
        "local",
    )


@pytest.mark.parametrize("wrong", ['[[providers]]\nname = "local"\n', PROVIDER.replace("local", "openai"), PROVIDER + PROVIDER])
async def test_providers_that_would_end_the_next_start_are_refused_already_now(tmp_path: Path, wrong: str) -> None:
    """The file is one: with a mistake in any part of it what was before stays."""
    (refused,) = await told_of(tmp_path / "models.toml", BEFORE + MINE + wrong)

    assert refused["event"] == "models_file_refused"
    assert "providers" in refused["why"]


def test_models_without_a_configured_provider_are_named_at_start(tmp_path: Path) -> None:
    """No key may be just what somebody wants, so that it is no warning."""
    (tmp_path / "models.toml").write_text(BEFORE + MINE)
    with capture_logs() as lines:
        tell_left_out(Router(read_table(tmp_path / "models.toml"), {"extractive"}, "fast", lambda: 0.0))

    assert [(line["log_level"], line["models"], line["why"]) for line in lines] == [("info", "mine", "the provider is not configured")]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (
            BEFORE + '[tiers.slow]\nmodels = [{ model = "extractive", weight = 0 }]\n',
            "tiers.slow: Expected `float` > 0.0 - at `models[0].weight`",
        ),
        (BEFORE + '[tiers.slow]\nmodles = ["extractive"]\n', "tiers.slow: Object contains unknown field `modles`"),
        (f"nested = {'[' * 5000}{']' * 5000}\n{BEFORE}", "it is nested too deeply"),
    ],
)
async def test_a_mistake_is_told_with_its_place(tmp_path: Path, content: str, place: str) -> None:
    """Of many tiers, which. What was read before stays, and the file is looked at on."""
    (refused,) = await told_of(tmp_path / "models.toml", content)

    assert (refused["event"], refused["log_level"]) == ("models_file_refused", "error")
    assert place in refused["why"]


def test_a_mark_of_byte_order_is_no_mistake(tmp_path: Path) -> None:
    """Some editors put it before the text."""
    path = tmp_path / "models.toml"
    path.write_text(BEFORE, encoding="utf-8-sig")

    assert read_table(path).tiers
