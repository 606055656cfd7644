"""One question through everything: steps, passages, text, citations, receipt; then the same again from the cache."""

import hashlib

import httpx
import pytest

from bench.script import Behaviour, answer_text
from tests.suite import Suite, ask, events

PROVIDER_STEPS = {"recall", "passages", "compose", "hold", "generate", "validate"}
"""Steps that every provider answer has run by the time it is done; `history`, `record` and `remember` may come after or be skipped."""


async def test_an_answer_streams_its_steps_its_passages_its_text_and_one_receipt(suite: Suite, client: httpx.AsyncClient) -> None:
    """Everything the page shows is in the stream, in an order that can be shown as it comes."""
    await suite.provider.behave(Behaviour(tokens=30))

    answer = await ask(client, "Who rebuilt the heron gate at Lower Mill?", cache="off")
    done = answer.done

    assert answer.names[0] == "accepted"
    assert answer.names.index("passages") < answer.names.index("delta")
    assert {step["name"] for step in answer.data("step") if step["status"] == "done"} >= PROVIDER_STEPS
    assert answer.text == answer_text(Behaviour(tokens=30), cites=True)
    assert done["text_sha256"] == hashlib.sha256(answer.text.encode()).hexdigest()
    assert (done["answer_id"], done["finish_reason"], done["cache"]["verdict"]) == (answer.answer_id, "end_turn", "off")
    assert int(done["usage"]["output_tokens"]) == 30
    assert int(done["cost_nanousd"]) > 0
    assert done["trace_id"] == answer.data("accepted")[0]["trace_id"]


async def test_a_citation_points_at_the_passage_it_names(suite: Suite, client: httpx.AsyncClient) -> None:
    """The marker's place in the text, the passage's text and the document's own text all agree."""
    answer = await ask(client, "Which turbine does the turbine hall house?", cache="off")
    citation = answer.data("citation")[0]
    passage = next(passage for passage in answer.data("passages")[0]["passages"] if passage["number"] == citation["number"])
    document = (await client.get(f"/v1/documents/{passage['document_id']}")).raise_for_status().json()
    chunk = next(chunk for chunk in document["chunks"] if chunk["chunk_id"] == citation["chunk_id"])

    assert answer.text[int(citation["start"]) : int(citation["end"])] == "[1]"
    assert (citation["document_id"], citation["chunk_id"]) == (passage["document_id"], passage["chunk_id"])
    assert "Francis turbine" in passage["text"]
    assert passage["text"] == chunk["text"]
    assert (int(passage["start"]), int(passage["end"])) == (chunk["start"], chunk["end"])


async def test_the_same_question_again_is_an_exact_hit_and_costs_nothing(suite: Suite, client: httpx.AsyncClient) -> None:
    """The second asking calls no provider, repeats the text and names what it saved."""
    first = await ask(client, "How is the heron gate opened by the millers?")
    second = await ask(client, "How is the heron gate opened by the millers?")
    cache = second.done["cache"]

    assert (first.done["cache"]["verdict"], cache["verdict"]) == ("miss", "exact")
    assert (second.text, second.data("citation")) == (first.text, first.data("citation"))
    assert cache["saved_nanousd"] == first.done["cost_nanousd"]
    assert cache["source_answer_id"] == first.answer_id
    assert {value for value in second.done["usage"].values()} == {"0"}
    assert second.done["cost_nanousd"] == "0"
    assert len(await suite.provider.records()) == 1


async def test_other_words_for_the_same_question_are_a_semantic_hit(suite: Suite, client: httpx.AsyncClient) -> None:
    """A polite form of an answered question is served from memory, and says how near it was."""
    first = await ask(client, "Who cleans the eel ladder beside the weir?")
    second = await ask(client, "Please tell me who cleans the eel ladder beside the weir.")
    cache = second.done["cache"]

    assert cache["verdict"] == "semantic"
    assert 0.8 < cache["similarity"] <= 1
    assert (cache["source_question"], cache["source_answer_id"]) == ("Who cleans the eel ladder beside the weir?", first.answer_id)
    assert second.text == first.text
    assert len(await suite.provider.records()) == 1


async def test_a_changed_document_makes_answers_that_rest_on_it_unreachable(suite: Suite) -> None:
    """As soon as the change is acknowledged, no older answer is served."""
    await suite.provider.reset()
    async with suite.client("eve", "changing") as client:
        for text in ("The lock keeper lives in the red house.", "The lock keeper lives in the blue house."):
            (await client.post("/v1/documents?wait=true", json={"title": "Keeper", "text": text})).raise_for_status()
            answer = await ask(client, "Where does the lock keeper of the canal live?")

            assert answer.done["cache"]["verdict"] == "miss"
            assert text in answer.data("passages")[0]["passages"][0]["text"]

    assert len(await suite.provider.records()) == 2


async def test_without_a_stream_the_answer_is_one_document(suite: Suite, client: httpx.AsyncClient) -> None:
    """`stream: false` gives the same text, citations and receipt as JSON."""
    response = await client.post("/v1/answers", json={"question": "What lights the village?", "stream": False, "cache": "off"})
    body = response.json()

    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert body["text"] == answer_text(Behaviour(), cites=True)
    assert body["citations"][0]["number"] == 1
    assert len(response.headers["x-trace-id"]) == 32


async def test_an_answer_can_be_looked_up_as_soon_as_it_is_done(suite: Suite, client: httpx.AsyncClient) -> None:
    """The record agrees with the stream: text, steps, usage, cost, attempts, trace."""
    answer = await ask(client, "Who keeps the bronze wheel of the heron gate?", cache="off")
    response = await client.get(f"/v1/answers/{answer.answer_id}")
    record = response.json()

    assert response.status_code == 200, record
    assert record["text"] == answer.text
    assert record["cost_nanousd"] == answer.done["cost_nanousd"]
    assert record["usage"] == answer.done["usage"]
    assert record["trace_id"] == answer.done["trace_id"]
    assert {step["name"] for step in record["steps"]} >= PROVIDER_STEPS
    assert [attempt["provider"] for attempt in record["attempts"]] == ["anthropic"]


async def test_a_stream_can_be_read_again_from_any_event(suite: Suite, client: httpx.AsyncClient) -> None:
    """What is resumed is what was sent, event for event; after the end there is nothing more."""
    answer = await ask(client, "What does the shaft of the turbine drive?", cache="off")
    for after in (0, 1, len(answer.events) // 2, len(answer.events) - 1):
        async with client.stream("GET", f"/v1/answers/{answer.answer_id}/events", headers={"last-event-id": str(after)}) as response:
            assert response.status_code == 200
            assert [event async for event in events(response)] == answer.events[after:]
    ended = await client.get(f"/v1/answers/{answer.answer_id}/events", headers={"last-event-id": str(len(answer.events))})

    assert ended.status_code == 204


async def test_a_conversation_goes_into_the_prompt_only_when_the_question_leans_on_it(suite: Suite, client: httpx.AsyncClient) -> None:
    """ "And who cleans it?" is asked with the turns before it, and never served from the cache."""
    await ask(client, "What is the eel ladder made for in spring?", session_id="leaning")
    leaning = await ask(client, "And who cleans it?", session_id="leaning")
    await ask(client, "What colour has the wheel of the heron gate?", session_id="leaning")
    leaned, alone = (await suite.provider.prompts())[-2:]

    assert [len(leaned["messages"]), len(alone["messages"])] == [3, 1]
    assert leaned["messages"][0]["content"] != alone["messages"][0]["content"]
    assert leaning.done["cache"]["reason"] == "context_dependent"


async def test_the_suite_answers_from_the_passages_alone_without_any_provider(suite: Suite, client: httpx.AsyncClient) -> None:
    """The extractive model cites real sentences, costs nothing, says what it is, and is booked like any other."""
    answer = await ask(client, "Who rebuilt the heron gate after the great flood?", model="extractive", cache="off")

    assert "Elsa Brandt" in answer.text
    assert answer.data("citation")
    assert (answer.done["provider"], answer.done["cost_nanousd"]) == ("extractive", "0")
    assert await suite.provider.records() == []


@pytest.mark.parametrize("user", [("ben", "acme"), ("ada", "globex")])
async def test_nobody_else_sees_an_answer(suite: Suite, client: httpx.AsyncClient, user: tuple[str, str]) -> None:
    """Another's answer and an unknown one look the same to anybody but its owner."""
    answer = await ask(client, "Where do young eels climb to?", cache="off")
    async with suite.client(*user) as other:
        for path in ("", "/events"):
            foreign = await other.get(f"/v1/answers/{answer.answer_id}{path}")
            unknown = await other.get(f"/v1/answers/01890000-0000-7000-8000-000000000000{path}")

            assert (foreign.status_code, foreign.json()["reason"]) == (404, "NOT_FOUND")
            assert foreign.json()["detail"] == unknown.json()["detail"]
        cancelled = await other.post(f"/v1/answers/{answer.answer_id}/cancel")

    assert cancelled.status_code == 404
