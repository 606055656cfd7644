"""Hostile text on its whole way: uploaded as title and content, found, cited, streamed, kept as a conversation, and shown again."""

import json
from pathlib import Path

import httpx
import orjson

from tests.event_streams import hostile_strings, read_by_the_standard
from tests.suite import Suite

SAMPLE = 40
TENANT = "hostile-mill"
LINES = {"content-type": "application/x-ndjson"}


async def test_a_documents_title_and_text_reach_readers_as_they_are_and_add_no_event(suite: Suite, data_dir: Path) -> None:
    """For each of a sample: a document of that title, a question that finds it, and events that are numbered without a gap."""
    strings = hostile_strings(data_dir)
    sample = [text for text in strings[:: max(1, len(strings) // SAMPLE)] if text.strip()]
    shown, accepted = 0, 0
    async with suite.client("mallory", TENANT) as client:
        for number, title in enumerate(sample):
            body = {"title": title, "text": f"The lantern of berth {number} is {title} and nothing else.", "collection": f"c{number}"}
            response = await client.post("/v1/documents:bulk", content=orjson.dumps(body), headers=LINES)
            said = [one for event in read_by_the_standard(response.content) if "stage" in (one := json.loads(event.data))]
            if [one["stage"] for one in said][-1:] != ["indexed"]:
                continue  # refused by field, as other tests show
            accepted += 1
            question = {"question": f"What is the lantern of berth {number}?", "collection": f"c{number}", "cache": "off"}
            response = await client.post("/v1/answers", json=question)
            events = read_by_the_standard(response.content)
            kinds = [event.event for event in events]

            assert (kinds[0], kinds[-1], kinds.count("done")) == ("accepted", "done", 1), (title, kinds)
            assert [event.id for event in events] == [str(place) for place in range(1, len(events) + 1)], title
            passages = next(json.loads(event.data)["passages"] for event in events if event.event == "passages")
            shown += passages[0]["title"] == said[-1]["name"]

    assert accepted > SAMPLE / 2
    assert shown == accepted


async def test_a_question_of_any_kind_is_the_title_of_its_conversation(suite: Suite, data_dir: Path, client: httpx.AsyncClient) -> None:
    """As it was asked, cut to its bound, or the question is refused by field."""
    strings = hostile_strings(data_dir)
    kept = 0
    for number, question in enumerate(strings[:: max(1, len(strings) // SAMPLE)]):
        response = await client.post("/v1/answers", json={"question": question, "session_id": f"hostile-{number}", "stream": False})
        if response.status_code != 200:
            assert response.status_code == 400, response.text
            continue
        record = (await client.get(f"/v1/sessions/hostile-{number}")).json()
        assert record["turns"][0]["question"] == question.strip() or record["turns"][0]["question"] == question
        assert record["title"] == record["turns"][0]["question"][:120]
        kept += 1

    assert kept > SAMPLE / 2
