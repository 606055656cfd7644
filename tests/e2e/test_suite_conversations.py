"""A conversation through the whole suite: asked, regenerated, edited, gone back to, renamed, taken away and forgotten."""

import json

import httpx

from tests.suite import Suite, ask, until

GATE, LADDER = "Who rebuilt the heron gate after the great flood?", "What is the eel ladder beside the weir for?"


async def test_a_conversation_branches_and_everything_of_it_can_be_taken_away(suite: Suite, client: httpx.AsyncClient) -> None:
    """The current branch is what is read and what the next question follows; the other one stays; deleting leaves the money alone."""
    path = "/v1/sessions/branching"

    async def turns(query: str = "") -> list[str]:
        shown = await client.get(path + query)
        return [turn["question"] for turn in shown.json()["turns"]] if shown.status_code == 200 else []

    async def has(*questions: str) -> None:
        async def there() -> bool:
            return await turns() == list(questions)

        await until(there)

    first = await ask(client, GATE, session_id="branching")
    await has(GATE)
    again = await ask(client, GATE, session_id="branching", replaces=first.answer_id)
    await has(GATE)
    second = await ask(client, LADDER, session_id="branching")
    await has(GATE, LADDER)
    edited = await ask(client, "What does the turbine hall house?", session_id="branching", replaces=second.answer_id)
    await has(GATE, "What does the turbine hall house?")
    everything = (await client.get(f"{path}?branches=all")).json()
    exported = await client.get(f"{path}/export")
    lines = [json.loads(line) for line in (await client.get("/v1/sessions:export")).text.splitlines()]
    renamed = (await client.patch(path, json={"title": "The mill", "head_answer_id": second.answer_id})).json()
    went_back = await turns()
    gone = await client.delete(path)
    record = (await client.get(f"/v1/answers/{again.answer_id}")).json()

    assert again.done["cache"]["reason"] == "regenerated"
    assert {turn["answer_id"]: turn["parent_answer_id"] for turn in everything["turns"]} == {
        first.answer_id: "",
        again.answer_id: "",
        second.answer_id: again.answer_id,
        edited.answer_id: again.answer_id,
    }
    assert exported.headers["content-type"].startswith("text/markdown")
    assert exported.text.count("\n## ") == 4
    assert "*Another branch: follows 2.*" in exported.text
    assert {line["session"]["session_id"] for line in lines if "session" in line} >= {"branching"}
    assert lines[-1] == {"complete": True, "records": len(lines) - 1}
    assert (renamed["title"], renamed["title_by"]) == ("The mill", "user")
    assert went_back == [GATE, LADDER]
    assert gone.status_code == 204
    assert (await client.get(path)).status_code == 404
    assert (record["session_id"], "text" in record, record["status"]) == ("", False, "done")


async def test_a_follow_up_finds_what_it_means_without_a_provider(suite: Suite, client: httpx.AsyncClient) -> None:
    """By rule, since who asks the extractive model pays for no other: the pointer is named, and the right document answers."""
    fields = {"model": "extractive", "session_id": "mill"}
    await ask(client, "Who rebuilt the heron gate?", **fields)
    opened = await ask(client, "How is it opened?", **fields)
    cleaned = await ask(client, "Who cleans the eel ladder?", **fields)
    when = await ask(client, "When do they clean it?", **fields)

    assert "bronze wheel" in opened.text
    assert "guild" in cleaned.text
    assert "Every spring" in when.text
    assert await suite.provider.records() == []
