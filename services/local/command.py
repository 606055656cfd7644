"""The `tailrace` command: its arguments and how results look in a terminal. What is done is in the modules it calls."""

import asyncio
import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import tailrace
from services.chassis.config import SettingsError
from services.chassis.principal import ROLES
from services.local.config import make_state_dir, state_dir

LEFT_OUT_SUFFIXES = frozenset({".log"})
"""Read if they are named, and not taken from a folder: logs grow, and would be ingested again and again."""
FOREIGN_FOLDERS = frozenset({"node_modules", "site-packages", "__pycache__"})
"""Folders of programs that others wrote, and of what is made from code."""
FILES_PER_STREAM = 100
JOBS_SHOWN = 50
WIDTH_OF_A_PIPE = 200
"""Columns of a table that is not shown in a terminal: it must not be cut for a width nobody has."""

HIT_CHARACTERS = 160
OBEYED = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})
"""Control characters (ISO/IEC 6429): in a terminal they would clear it, rename it or write over what was said."""
FACT_HELP = "A fact about them, as key=value; may be given more than once."

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Tailrace: answers that are streamed, cited and priced."
)
ledger = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after the books.")
app.add_typer(ledger, name="ledger")


@dataclass(frozen=True)
class Filing:
    """Where documents go, what is said of them, and who may read them."""

    collection: str
    metadata: dict[str, str | float | bool]
    access: tailrace.Access | None


def main() -> None:
    """Run the command; errors a user can do something about are one line, not a traceback."""
    try:
        app()
    except tailrace.TailraceError as error:
        hint = (
            "\nStart it with `tailrace up`, or set TAILRACE_TARGET." if isinstance(error, tailrace.Unavailable) and not error.reason else ""
        )
        sys.exit(f"{type(error).__name__}: {error}{hint}")
    except SettingsError as error:
        sys.exit(f"the settings are wrong\n{error}")


@app.command()
def up() -> None:
    """Start stores and services, and keep them alive until Ctrl-C."""
    from services.local.preflight import NotPossible
    from services.local.suite import up as bring_up

    try:
        code = bring_up(os.environ)
    except NotPossible as error:
        sys.exit(f"tailrace: {error}")
    raise typer.Exit(code)


@app.command()
def ask(
    question: str,
    session: Annotated[str, typer.Option(help="Conversation to go on with.")] = "",
    collection: Annotated[str, typer.Option(help="Documents to answer from.")] = "",
    model: Annotated[str, typer.Option(help="Model to ask.")] = "",
    tier: Annotated[str, typer.Option(help="Tier to ask: fast, smart, …")] = "",
    cache: Annotated[str, typer.Option(help="use, refresh or off.")] = "use",
    steps: Annotated[bool, typer.Option("--steps", help="Show the steps of the chain as they end.")] = False,
) -> None:
    """Ask a question; the answer streams to standard output, everything else to standard error."""
    if cache not in {"use", "refresh", "off"}:
        raise typer.BadParameter("use, refresh or off", param_hint="--cache")

    async def run() -> None:
        async with connected() as client:
            sources: dict[int, tailrace.Passage] = {}
            cited: dict[int, None] = {}
            line_open = False
            answer = client.answer(question, session_id=session, collection=collection, model=model, tier=tier, cache=cache)  # type: ignore[arg-type]
            async for event in answer:
                match event:
                    case tailrace.Step() if steps and event.status != "running":
                        if line_open:
                            note("")
                            line_open = False
                        note(f"  {event.name:<9} {event.duration_ms:8.1f} ms  {'' if event.status == 'done' else event.status}")
                    case tailrace.Passages():
                        sources = {passage.number: passage for passage in event.passages}
                    case tailrace.Delta():
                        text = event.text.translate(OBEYED)
                        line_open = not text.endswith("\n") if text else line_open
                        sys.stdout.write(text)
                        sys.stdout.flush()
                    case tailrace.Citation():
                        cited[event.number] = None
                    case tailrace.Receipt():
                        sys.stdout.write("\n")
                        sys.stdout.flush()
                        for number in sorted(cited):
                            note(f"  [{number}] {printable(describe(sources[number]))}" if number in sources else f"  [{number}]")
                        note(cost_line(event))

    finish(run())


@app.command()
def ingest(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns such as 'docs/**/*.md'.")],
    collection: Annotated[str, typer.Option(help="Collection to put them in.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line for each document, and one for the sum.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on with changed and deleted files of the folders until Ctrl-C.")] = False,
    user: Annotated[list[str] | None, typer.Option(help="A user who may read them; may be given more than once.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="A group that may read them; may be given more than once.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help=FACT_HELP)] = None,
) -> None:
    """Take in documents: PDF, Office, mail, Markdown, HTML, tables, data and code. Exit code 1 if any failed.

    With --user or --group only those named, you and the tenant's admins may read them; without, they stay as they are.
    """
    access = tailrace.Access(tuple(user or ()), tuple(group or ())) if user or group else None
    filing = Filing(collection, dict(map(fact, metadata or ())), access)
    if watch:
        finish(watched(paths, filing, as_json))
        return
    uploads = list(found(paths))
    if not uploads:
        sys.exit(f"no documents found in {', '.join(paths)}: no file has the name of a format that is read")
    if others := passed_over(paths):
        note(f"{others} other files are passed over: from folders only what has the name of a format that is read is taken, and no logs")
    raise typer.Exit(finish(ingestion(uploads, filing, as_json)))


@app.command()
def search(
    query: str,
    collection: Annotated[list[str] | None, typer.Option(help="Where to search; may be given more than once.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help=FACT_HELP)] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 10,
    mode: Annotated[str, typer.Option(help="hybrid, dense or sparse.")] = "hybrid",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line for each hit, with what explains its place.")] = False,
) -> None:
    """Search documents; best hit first. With --metadata only documents that have all of these facts."""
    if mode not in {"hybrid", "dense", "sparse"}:
        raise typer.BadParameter("hybrid, dense or sparse", param_hint="--mode")
    first, *more = collection or [""]
    conditions = [tailrace.Condition(key, (value,)) for key, value in map(fact, metadata or ())]

    async def run() -> None:
        async with connected() as client:
            async for hit in client.search(
                query,
                limit=limit,
                mode=mode,  # type: ignore[arg-type]
                collection=first,
                more_collections=more,
                metadata=conditions,
                explain=as_json,
            ):
                typer.echo(json.dumps(dataclasses.asdict(hit)) if as_json else hit_lines(hit))

    finish(run())


def fact(text: str) -> tuple[str, str | float | bool]:
    """`key=value`: true, false and numbers are what they look like, and so is a string in quotes; everything else is text."""
    key, sign, written = text.partition("=")
    if not key or not sign:
        raise typer.BadParameter(f"{text}: not key=value", param_hint="--metadata")
    try:
        value = json.loads(written)
    except ValueError:
        return key, written
    return key, value if isinstance(value, str | bool) else float(value) if _is_finite(value) else written


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def hit_lines(hit: tailrace.Hit) -> str:
    """A hit as its title, page, score, and the beginning of its text."""
    page = f"  p. {hit.page}" if hit.page else ""
    flags = f"  ! {', '.join(hit.flags)}" if hit.flags else ""
    return f"[{hit.number}] {hit.score:.3f}  {printable(describe(hit))}{page}{flags}\n    {printable(hit.text)[:HIT_CHARACTERS]}"


def printable(text: str) -> str:
    """On one line, without signs that a terminal would obey: what documents hold is only ever shown."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


@app.command()
def jobs(
    job_id: Annotated[str, typer.Argument(help="Which ingestion; without it, the latest are listed.")] = "",
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop it.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Take in again what failed or was cancelled.")] = False,
    index: Annotated[int | None, typer.Option(min=0, help="Only this document of it.")] = None,
) -> None:
    """Show ingestions, or one of them by document; cancel or retry it."""
    if (cancel and retry) or ((cancel or retry or index is not None) and not job_id):
        raise typer.BadParameter("name one ingestion, and one of --cancel and --retry", param_hint="JOB_ID")

    async def run() -> None:
        async with connected() as client:
            if cancel:
                typer.echo(f"{await client.cancel_job(job_id, index=index)} cancelled")
            elif retry:
                typer.echo(f"{await client.retry_job(job_id, index=index)} on their way again")
            elif job_id:
                job, documents = await client.job(job_id)
                typer.echo(_job_line(job))
                for row in documents:
                    if index in (None, row.index):
                        typer.echo(f"{row.index:>6}  {row.stage:<9}  {row.name}  {row.error_detail or row.error_reason}".rstrip())
            else:
                count = 0
                async for job in client.jobs():
                    typer.echo(_job_line(job))
                    if (count := count + 1) == JOBS_SHOWN:
                        break

    finish(run())


def _job_line(job: tailrace.Job) -> str:
    stages = ", ".join(f"{count} {stage}" for stage, count in sorted(job.stages.items()))
    return f"{job.job_id}  {job.status:<9}  {job.created_at.astimezone():%d %b %H:%M:%S}  {job.documents} documents: {stages or 'none yet'}"


@app.command()
def token(
    user: Annotated[str, typer.Option(help="Whom it is for (`sub`).")],
    tenant: Annotated[str, typer.Option(help="Their tenant.")] = "local",
    role: Annotated[list[str] | None, typer.Option(help="user, service or admin; may be given more than once.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="A group they belong to; may be given more than once.")] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long it is valid.")] = 30,
) -> None:
    """Print a token signed with the development key of the state directory."""
    from services.local.issuer import Issuer

    roles = role or ["user"]
    if unknown := set(roles) - ROLES:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(sorted(ROLES))}", param_hint="--role")
    for option, names, length_max in (("--user", [user], 256), ("--tenant", [tenant], 128), ("--group", group or [], 128)):
        for name in names:  # the gateway asks the same of the claims
            if not 1 <= len(name) <= length_max or not name.isprintable() or name.strip() != name:
                raise typer.BadParameter(f"1-{length_max} printable characters, no space around them", param_hint=option)
    if os.environ.get("TAILRACE_ENV") == "production":
        sys.exit("TAILRACE_ENV=production accepts no tokens of the development issuer; ask your own issuer")
    folder = state_dir(os.environ)
    make_state_dir(folder)
    typer.echo(Issuer(folder).mint(user, tenant, roles, days * 24 * 3600, group or ()))


@ledger.command("dead-letters")
def dead_letters(
    retry: Annotated[bool, typer.Option("--retry", help="Put them back into the outbox; they are sent at the next start.")] = False,
) -> None:
    """Show the records of this machine's orchestrator that the ledger could never book. The orchestrator must not run."""
    from services.orchestrator import spool
    from tailrace.ledger.v1 import ledger_service_pb2

    path = state_dir(os.environ) / "orchestrator" / "spool.db"
    try:
        if retry:
            typer.echo(f"{spool.retry_dead_letters(path)} put back into the outbox")
            return
        for letter in spool.dead_letters(path):
            record = ledger_service_pb2.Operation.FromString(letter.payload)
            typer.echo(f"{letter.rejected_at}  {record.tenant}/{record.user}  {record.operation_id}  {letter.reason}: {letter.detail}")
    except OSError as error:
        sys.exit(f"tailrace: {error}")


@app.command()
def doctor() -> None:
    """Look at what could keep Tailrace from running here. Exit code 1 if something does."""
    from services.local.doctor import examine

    bad = 0
    for finding in examine(os.environ):
        bad += finding.state == "bad"
        typer.echo(f"{finding.state:<5} {finding.name:<11} {finding.text}")
    raise typer.Exit(1 if bad else 0)


@ledger.command()
def reconcile(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Usage export of Anthropic or OpenAI: .csv, or JSON.")],
    max_drift: Annotated[str, typer.Option(help="Most that tokens or cost may differ, such as 1% or 0.5%.")] = "1%",
) -> None:
    """Compare a provider's usage export with the books, by model and day. Exit code 1 if they differ too much."""
    from services.chassis.errors import DomainError
    from services.local.reconciling import alerts_of, compared, percent, table

    bound = percent(max_drift)
    if bound is None:
        raise typer.BadParameter("a percentage, such as 1%", param_hint="--max-drift")
    try:
        report = finish(compared(file, database_url()))
    except (DomainError, OSError, UnicodeError) as error:
        typer.echo(f"tailrace: {file}: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(table(report))
    alerts = alerts_of(report, bound, max_drift)
    for alert in alerts:
        typer.echo(f"alert: {alert}", err=True)
    raise typer.Exit(1 if alerts else 0)


@app.command()
def regret(limit: Annotated[int, typer.Option(min=1, max=1000, help="Most shadow answers to look at, latest first.")] = 1000) -> None:
    """What the choice of tier saved and lost, from shadow answers. Wants a token of the tenant they are booked on."""
    from services.local.regret import pairs_of, regret_of, table

    async def run() -> None:
        async with connected() as client:
            pairs = pairs_of([row async for row in client.operations(limit=limit)])
        typer.echo(table([regret_of(*tiers, found) for tiers, found in sorted(pairs.items())]))

    finish(run())


@app.command()
def operations(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", help="Keep the table up to date until Ctrl-C.")] = False,
) -> None:
    """Show the latest operations: model, tokens, cost, cache verdict, latency."""
    from rich.console import Console
    from rich.live import Live

    async def table(client: tailrace.AsyncClient) -> Any:
        return operations_table([row async for row in client.operations(limit=limit)])

    async def run() -> None:
        async with connected() as client:
            console = Console()
            if not console.is_terminal:
                console.width = WIDTH_OF_A_PIPE
            if not watch:
                console.print(await table(client))
                return
            with Live(await table(client), console=console, auto_refresh=False) as live:
                while True:
                    await asyncio.sleep(1)
                    live.update(await table(client), refresh=True)

    finish(run())


@ledger.command()
def verify() -> None:
    """Prove that the books are whole, and name the first bad row if not. Exit code 1 then. Reads only, and may run at any time."""
    from services.ledger.verify import verify as held_against_the_laws

    findings = finish(_asked_of_the_database(held_against_the_laws))
    for finding in findings:
        typer.echo(f"{'bad' if finding.broken else 'ok':<5} {finding.rows:>10}  {finding.law}")
        if finding.broken:
            typer.echo(f"      {finding.at}: {finding.wrong}")
    raise typer.Exit(1 if any(finding.broken for finding in findings) else 0)


async def _asked_of_the_database(work: Callable[[str], Coroutine[Any, Any, Any]]) -> Any:
    """What `work` says of the suite's database. Ends the command with one line if it cannot be asked."""
    import asyncpg

    try:
        return await work(database_url())
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        sys.exit(f"the database cannot be asked: {type(error).__name__}: {error}")


def database_url() -> str:
    """The database the environment names, else that of this state directory."""
    if url := os.environ.get("DATABASE_URL"):
        return url
    path = state_dir(os.environ) / "database-url"
    try:
        return path.read_text().strip()
    except OSError:
        sys.exit(f"no database: set DATABASE_URL, or start Tailrace with `tailrace up`, which writes {path}")


def target() -> str:
    """The suite the environment names, else the one of this machine."""
    return os.environ.get("TAILRACE_TARGET") or f"127.0.0.1:{os.environ.get('TAILRACE_GATEWAY_PORT') or 50050}"


def connected() -> tailrace.AsyncClient:
    """A client for the suite the environment names, else for the one of this state directory."""
    secret = os.environ.get("TAILRACE_TOKEN")
    if not secret:
        path = state_dir(os.environ) / "dev-token"
        try:
            secret = path.read_text()
        except OSError:
            sys.exit(f"no token: set TAILRACE_TOKEN, or start Tailrace with `tailrace up`, which writes {path}")
    return tailrace.AsyncClient(target(), token=secret)


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work`; Ctrl-C ends it quietly."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def note(text: str) -> None:
    """Say something about the answer, apart from it."""
    typer.echo(text, err=True)


def describe(passage: tailrace.Passage) -> str:
    """A passage as one line."""
    title = passage.title or passage.source_uri
    return " › ".join([title, *(heading for heading in passage.heading_path if heading != title)])


def cost_line(receipt: tailrace.Receipt) -> str:
    """The receipt as one line."""
    cost = f"{'about ' if receipt.estimated else ''}{usd(receipt.cost_nanousd)}"
    saved = f" (saved {usd(receipt.cache.saved_nanousd)})" if receipt.cache.saved_nanousd else ""
    return (
        f"  {receipt.model} · {receipt.usage.input_tokens} + {receipt.usage.output_tokens} tokens · {cost}{saved} · "
        f"cache {receipt.cache.verdict} · first text {receipt.first_token_ms:.0f} ms, all {receipt.duration_ms:.0f} ms · "
        f"trace {receipt.trace_id}"
    )


def usd(nanousd: int) -> str:
    """Nano-USD as people read them, exact."""
    whole, rest = divmod(abs(nanousd), 1_000_000_000)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanousd < 0 else ''}{whole}.{decimals} USD"


def found(paths: list[str]) -> Iterator[tuple[str, Path]]:
    """Every document in `paths`, each once, with the name it will be known by: its place below the folder that was named."""
    seen: set[Path] = set()
    for text in paths:
        path = Path(text)
        if path.is_dir():
            readable = filter(_is_taken, _inside(path))
            named = [(f"{path.resolve().name}/{item.relative_to(path)}", item) for item in readable]
        elif path.is_file():
            named = [(path.name, path)]
        elif any(sign in text for sign in "*?["):
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(anchor))
            named = [(str(item), item) for item in sorted(anchor.glob(pattern)) if item.is_file()]
        else:
            sys.exit(f"{text}: no such file or folder")
        for name, item in named:
            if (resolved := item.resolve()) not in seen:
                seen.add(resolved)
                yield name, item


def passed_over(paths: list[str]) -> int:
    """How many files in the folders among `paths` are of another kind than documents."""
    folders = [path for path in map(Path, paths) if path.is_dir()]
    return len({item.resolve() for folder in folders for item in _inside(folder) if not _is_taken(item)})


def _is_taken(item: Path) -> bool:
    """Whether a file of a folder is sent. One that is named by itself always is: the service knows best what it can read."""
    from services.retrieval.parsers.detection import is_known_by_name

    return item.suffix.lower() not in LEFT_OUT_SUFFIXES and is_known_by_name(item.name)


def _inside(folder: Path) -> list[Path]:
    """Files below `folder`, but hidden and foreign ones."""

    def is_own(part: str) -> bool:
        return not part.startswith(".") and part not in FOREIGN_FOLDERS

    return [item for item in sorted(folder.rglob("*")) if all(map(is_own, item.relative_to(folder).parts)) and item.is_file()]


async def ingestion(files: list[tuple[str, Path]], filing: Filing, as_json: bool) -> int:
    """Send `files` in streams of bounded length, show each one's stage, and return the exit code."""
    stages: Counter[str] = Counter()
    chunks = 0
    with _shown(len(files), as_json) as show:
        async for progress in _progress(files, filing):
            show(progress)
            if progress.final:
                stages[progress.stage] += 1
                chunks += progress.chunks_total if progress.stage == "indexed" else 0
    unanswered = len(files) - stages.total()
    if as_json:
        typer.echo(json.dumps({"documents": len(files), **stages, "chunks": chunks, "unanswered": unanswered}))
    else:
        parts = [f"{stages[stage]} {stage}" for stage in ("indexed", "unchanged", "failed", "cancelled") if stages[stage]]
        typer.echo(f"{len(files)} documents: {', '.join(parts) or 'none taken in'}; {chunks} new chunks")
    return 1 if stages["failed"] or stages["cancelled"] or unanswered else 0


async def watched(paths: list[str], filing: Filing, as_json: bool) -> None:
    """Keep the collection in step with the folders among `paths`, until cancelled."""
    from services.local.watching import FILES_MAX, Ended, Files, Seen, Watch, changes_in, deleted
    from services.retrieval.domain import DEFAULT_COLLECTION

    folders = [path for path in map(Path, paths) if path.is_dir()]
    if len(folders) < len(paths):
        raise typer.BadParameter("only folders can be watched", param_hint="PATHS")
    collection = filing.collection or DEFAULT_COLLECTION

    def look() -> Files:
        files = dict(found(paths))
        if len(files) > FILES_MAX:
            sys.exit(f"more than {FILES_MAX} documents are too many for one watch")
        return files

    async def send(files: Files) -> AsyncIterator[Ended]:
        with _shown(len(files), as_json) as show:
            async for progress in _progress(list(files.items()), filing):
                show(progress)
                if progress.final and progress.stage != "cancelled" and progress.name in files:
                    yield Ended(progress.name, progress.document_id, progress.error_reason)

    async def forget(documents: Mapping[str, str]) -> None:
        async with connected() as client:
            if await deleted(client, documents, collection):
                for name in sorted(documents):
                    note(f"{name}: deleted")

    state = state_dir(os.environ)
    try:
        make_state_dir(state)
        seen = Seen.of(state / "watches", target(), collection, *sorted(str(folder.resolve()) for folder in folders))
    except OSError as error:
        sys.exit(f"what is watched cannot be noted: {error}")
    await Watch(look, send, forget, note, seen).follow(changes_in(folders))


async def _progress(files: list[tuple[str, Path]], filing: Filing) -> AsyncIterator[tailrace.Progress]:
    async with connected() as client:
        for start in range(0, len(files), FILES_PER_STREAM):
            some = files[start : start + FILES_PER_STREAM]
            uploads = [tailrace.Upload(name, path, metadata=filing.metadata, access=filing.access) for name, path in some]
            async for progress in client.ingest(*uploads, collection=filing.collection):
                yield progress


@contextmanager
def _shown(total: int, as_json: bool) -> Iterator[Callable[[tailrace.Progress], None]]:
    """What to call with each progress: lines of JSON, or a bar for all with a line for each document under way."""
    if as_json:

        def write(progress: tailrace.Progress) -> None:
            if progress.final:
                typer.echo(json.dumps(dataclasses.asdict(progress)))

        yield write
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[stage]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        everything = bars.add_task("all documents", total=total, stage="")
        under_way: dict[tuple[str, int], TaskID] = {}

        def draw(progress: tailrace.Progress) -> None:
            key = (progress.job_id, progress.index)
            if progress.final:
                if key in under_way:
                    bars.remove_task(under_way.pop(key))
                bars.advance(everything)
                if progress.stage == "failed":
                    bars.console.print(f"{progress.name}: {progress.error_detail or progress.error_reason}", markup=False, highlight=False)
                elif progress.unread_pages:
                    text = f"{progress.name}: pages {progress.unread_pages} are pictures, nothing on them will be found"
                    bars.console.print(text, markup=False, highlight=False)
                return
            if key not in under_way:
                under_way[key] = bars.add_task(progress.name, total=None, stage=progress.stage)
            bars.update(under_way[key], total=progress.chunks_total or None, completed=progress.chunks_done, stage=progress.stage)

        yield draw


def operations_table(rows: list[tailrace.Operation]) -> Any:
    """Operations as a table, newest first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("when", "status", "model", "tokens", "cost", "cache", "first", "all", "operation"):
        table.add_column(name, no_wrap=True, justify="right" if name in {"tokens", "cost", "first", "all"} else "left")
    for row in rows:
        tokens = f"{row.usage.input_tokens} + {row.usage.output_tokens}"
        when = row.created_at.astimezone().strftime("%d %b %H:%M:%S")
        status = row.error_reason or row.status
        first, whole = f"{row.first_token_ms:.0f} ms", f"{row.duration_ms:.0f} ms"
        table.add_row(when, status, row.model, tokens, usd(row.cost_nanousd), row.cache.verdict, first, whole, row.operation_id)
    return table
