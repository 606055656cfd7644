"""Tools of MCP servers: a real server of the package, in both revisions of the protocol, near, away and hostile."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.chassis.errors import Unavailable
from services.orchestrator.tools.mcp_servers import McpServer, ServerSettings, read_servers
from services.orchestrator.tools.toolbox import ToolFailed, ToolLimits
from tests.fakes.orchestrator_world import until
from tests.fakes.scripted_model import ScriptedModel, answered, call, question
from tests.fakes.tool_server import ToolServer, tool_server


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


def source(seen: ToolServer, clock: Any = None, **changes: Any) -> McpServer:
    settings: dict[str, Any] = {
        "name": "files",
        "url": seen.url,
        "headers": {"Authorization": "Bearer secret"},
        "tools": None,
        "confirm": frozenset(),
        "list_life_s": 300.0,
        **changes,
    }
    return McpServer(ServerSettings(**settings), clock or Hand())


@pytest.fixture(params=[False, True], ids=["2026-07-28", "2025-11-25"])
async def seen(request: pytest.FixtureRequest) -> Any:
    async with tool_server(sessions_only=request.param) as running:
        yield running


async def test_tools_are_listed_and_called_in_both_revisions(seen: ToolServer) -> None:
    """Names have the server's before them, hostile descriptions are made harmless, results carry what the tool promises."""
    server = source(seen)
    tools = await server.tools()
    added = await tools["files__add"].call({"a": 2, "b": 3}, question())
    read = await tools["files__files_read"].call({"path": "a.txt"}, question())
    await server.aclose()

    assert {"files__add", "files__files_read", "files__fail", "files__slow"} == set(tools)
    assert (added.text, added.structured) == ("5", {"result": 5}) and read.text == "text of a.txt"
    assert "</passages>" not in tools["files__files_read"].spec.description and "\u200b" not in tools["files__files_read"].spec.description
    assert seen.calls == [("add", (2, 3)), ("files.read", "a.txt")]
    assert all(headers["authorization"] == "Bearer secret" and "cookie" not in headers for headers in seen.headers)
    assert seen.methods.count("server/discover") == 1
    assert seen.methods.count("initialize") == (3 if seen.sessions_only else 0)
    sessions = {headers["mcp-session-id"] for headers in seen.headers if "mcp-session-id" in headers}
    assert len(sessions) == (3 if seen.sessions_only else 0)


async def test_an_answer_uses_a_servers_tools(seen: ToolServer) -> None:
    """Through the loop: checked on both ways, side by side, failures told."""
    server = source(seen)
    model = ScriptedModel([[call("files__add", a=2, b=3), call("files__fail"), call("files__add", "wrong", a="x", b=1)], "Five."])
    told = await answered(model, sources=[server], asked=question(server_tools=("files__add", "files__fail")))
    await server.aclose()

    assert told.failure is None and told.text == "Five." and seen.calls == [("add", (2, 3))]
    results = {result.call_id: result for result in told.results}
    assert (results["id-files__add"].text, results["id-files__add"].failed) == ("5", False)
    assert results["id-files__fail"].failed and "is not of type 'integer'" in results["wrong"].text
    assert ["files__add", "files__fail"] == [spec.name for spec in model.prompts[0].tools]


async def test_a_call_that_takes_too_long_is_given_up(seen: ToolServer) -> None:
    """The connection is closed and the answer goes on."""
    server = source(seen)
    await server.tools()
    told = await answered(
        ScriptedModel([call("files__slow"), "no luck"]),
        sources=[server],
        asked=question(server_tools=("files__slow",)),
        limits=ToolLimits(call_s=0.5),
    )
    await server.aclose()

    assert told.failure is None and told.text == "no luck" and told.results[0].text == "the tool took too long"


async def test_a_server_that_is_away_fails_the_call_and_is_back_at_once(seen: ToolServer) -> None:
    """Its list is kept meanwhile; one that was never listed leaves its tools out."""
    clock = Hand()
    server, fresh = source(seen, clock), source(seen, clock)
    tool = (await server.tools())["files__add"]
    seen.away = True
    with pytest.raises((Unavailable, ToolFailed)):
        await tool.call({"a": 1, "b": 1}, question())
    told = await answered(ScriptedModel(["without"]), sources=[fresh], asked=question(server_tools=("files__add",)))
    clock.at += 301
    assert "files__add" in await server.tools()
    seen.away = False
    again = await tool.call({"a": 1, "b": 1}, question())
    for each in (server, fresh):
        await each.aclose()

    assert told.text == "without" and told.steps("tools")[0].facts["missing"] == "files__add" and again.text == "2"


async def test_a_server_that_is_not_there_is_left_alone_for_a_while() -> None:
    """It is not asked again with every question, and is there again as soon as it is asked."""
    clock = Hand()
    async with tool_server(away=True) as seen:
        server = source(seen, clock)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await server.tools()
        asked, seen.away = len(seen.methods), False
        clock.at += 6
        assert "files__add" in await server.tools()
        assert seen.methods[:asked] == ["server/discover", "initialize"]
        await server.aclose()
    nobody = source(ToolServer(url="http://127.0.0.1:9/mcp"))
    with pytest.raises(Unavailable):
        await nobody.tools()
    await nobody.aclose()


async def test_a_server_that_keeps_silent_is_waited_for_once_and_not_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all who ask at the time together; it is left alone then, and is there again as soon as it speaks."""
    monkeypatch.setattr("services.orchestrator.tools.mcp_servers.LIST_S", 0.2)
    clock = Hand()
    async with tool_server(silent=True) as seen:
        server = source(seen, clock)
        async with asyncio.timeout(10):
            ends = await asyncio.gather(*(server.tools() for _ in range(4)), server.tools(), return_exceptions=True)
            told = await answered(ScriptedModel(["without"]), sources=[server], asked=question(server_tools=("files__add",)))
        asked, seen.silent = seen.methods.count("tools/list"), False
        clock.at += 6
        back = await server.tools()
        await server.aclose()

    assert [type(end) for end in ends] == [Unavailable] * 5
    assert (asked, told.text) == (1, "without") and "files__add" in back


async def test_nobody_waits_for_a_list_that_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one serves as long as the server keeps silent, and nothing is left running when we end."""
    monkeypatch.setattr("services.orchestrator.tools.mcp_servers.LIST_S", 600.0)
    clock = Hand()
    async with tool_server() as seen:
        server = source(seen, clock)
        await server.tools()
        seen.silent = True
        clock.at += 301
        async with asyncio.timeout(10):
            lists = [await server.tools() for _ in range(3)]
            await until(lambda: seen.methods.count("tools/list") == 2)
            lists.append(await server.tools())
            await server.aclose()

    assert all("files__add" in tools for tools in lists) and seen.methods.count("tools/list") == 2
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "tool list"]


async def test_a_server_that_floods_is_cut() -> None:
    """What it sends is bounded, however it calls it."""
    async with tool_server(flood=6 * 1024 * 1024) as seen:
        server = source(seen)
        with pytest.raises((Unavailable, ToolFailed)):
            async with asyncio.timeout(30):
                await server.tools()
        await server.aclose()


async def test_a_list_is_asked_for_again_when_it_is_old(seen: ToolServer) -> None:
    """And not before."""
    clock = Hand()
    server = source(seen, clock, list_life_s=10.0)
    for at in (0, 9):
        clock.at = 1_000.0 + at
        await server.tools()
    assert seen.methods.count("tools/list") == 1
    clock.at += 2
    old = await server.tools()
    await until(lambda: server._tools is not old)
    assert await server.tools() is not old
    await server.aclose()

    assert seen.methods.count("tools/list") == 2


async def test_only_tools_that_are_allowed_are_offered(seen: ToolServer) -> None:
    """The file says which, by the server's own names."""
    server = source(seen, tools=frozenset({"add", "files.read"}))
    tools = await server.tools()
    await server.aclose()

    assert {"files__add", "files__files_read"} == set(tools)
    assert server.knows("add") and server.knows("files_read") and not server.knows("fail")


FILE = """
[servers.files]
url = "https://files.example/mcp"
headers = { Authorization = "Bearer ${FILES_TOKEN}" }
tools = ["read", "files.write"]
confirm = ["files.write"]
list_life_s = 60

[servers.open-data]
url = "http://127.0.0.1:9000/"
confirm = ["*"]
"""


def test_servers_are_read_from_a_file(tmp_path: Path) -> None:
    """Secrets come from the environment and are in no repr."""
    (tmp_path / "mcp.toml").write_text(FILE)
    files, data = read_servers(tmp_path / "mcp.toml", {"FILES_TOKEN": "hunter2"})

    assert files.headers == {"Authorization": "Bearer hunter2"} and "hunter2" not in repr(files)
    assert files.tools == {"read", "files.write"} and files.confirmed == ["files__files_write"] and files.list_life_s == 60
    assert data.tools is None and data.confirmed == ["open-data__*"] and data.list_life_s == 300


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ('[servers.Big]\nurl = "https://x/"', "servers.Big: a name"),
        ('[servers.a_b]\nurl = "https://x/"', "servers.a_b: a name"),
        ("[servers.a]\n", "servers.a.url"),
        ('[servers.a]\nprogram = "npx"', "servers.a: unknown program"),
        ('[servers.a]\ncommand = "npx"', "servers.a.command"),
        ("[servers.a]\ncommand = []", "servers.a.command"),
        ('[servers.a]\ncommand = ["bin/npx"]', "servers.a.command"),
        ('[servers.a]\ncommand = ["npx"]\nurl = "https://x/"', "servers.a.url: not for a program"),
        ('[servers.a]\nurl = "https://x/"\nlife_s = 60', "servers.a.life_s: for a program alone"),
        ('[servers.a]\ncommand = ["npx"]\nlife_s = 0', "servers.a.life_s: 1-86400"),
        ('[servers.a]\ncommand = ["npx"]\nenvironment = { A = "${NONE}" }', "servers.a.environment: the variable NONE is not set"),
        ('[servers.a]\nurl = "ftp://x/"', "servers.a.url"),
        ('[servers.a]\nurl = "https://u:p@x/"', "servers.a.url"),
        ('[servers.a]\nurl = "https://x/"\nheaders = { A = "${NONE}" }', "the variable NONE is not set"),
        ('[servers.a]\nurl = "https://x/"\nheaders = { A = 1 }', "servers.a.headers"),
        ('[servers.a]\nurl = "https://x/"\ntools = "all"', "servers.a.tools"),
        ('[servers.a]\nurl = "https://x/"\ntools = ["send"]\nconfirm = ["sent"]', "servers.a.confirm: sent is not among its tools"),
        ('[servers.a]\nurl = "https://x/"\nlist_life_s = 0', "servers.a.list_life_s"),
        ("servers = 1", "servers: a table"),
        ("[servers.a", "Expected"),
    ],
)
def test_a_file_with_a_mistake_stops_the_start(tmp_path: Path, text: str, mistake: str) -> None:
    """And says where it is."""
    (tmp_path / "mcp.toml").write_text(text)
    with pytest.raises(ValueError, match=mistake):
        read_servers(tmp_path / "mcp.toml", {})
