"""What the user is told once everything runs. Nothing is started or asked here."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from services.local.config import MODEL_VARIABLES, LocalSettings

SAMPLE_QUESTION = "What happens when a client disconnects during an answer?"
"""Answered by the sample documents."""


def calls(settings: LocalSettings) -> list[str]:
    """Three shell lines that ask the first question, by three doors."""
    token = f"$(cat {shlex.quote(_short(settings.state_dir / 'dev-token'))})"
    body = f'\'{{"question": "{SAMPLE_QUESTION}"}}\''
    target = f"{settings.near_host}:{settings.gateway_port}"
    program = Path(sys.executable)
    python, tailrace = (shlex.quote(_short(path)) for path in (program, program.with_name("tailrace")))
    by_http = f'curl -N {settings.url}/v1/answers -H "authorization: Bearer {token}" -H "content-type: application/json" -d {body}'
    code = f'import tailrace; print(tailrace.Client().answer("{SAMPLE_QUESTION}").final().text)'
    by_python = f"TAILRACE_TARGET={target} TAILRACE_TOKEN=\"{token}\" {python} -c '{code}'"
    if shutil.which("grpcurl"):
        method = "tailrace.gateway.v1.GatewayService/Answer"
        return [by_http, by_python, f'grpcurl -plaintext -H "authorization: Bearer {token}" -d {body} {target} {method}']
    told = {"TAILRACE_STATE_DIR": _short(settings.state_dir), "TAILRACE_GATEWAY_PORT": str(settings.gateway_port)}
    usual = {"TAILRACE_STATE_DIR": ".tailrace", "TAILRACE_GATEWAY_PORT": "50050"}
    moved = "".join(f"{name}={shlex.quote(value)} " for name, value in told.items() if value != usual[name])
    return [by_http, by_python, f'{moved}{tailrace} ask --steps "{SAMPLE_QUESTION}"']


def banner(settings: LocalSettings, *, signed_in: bool, seconds: float, note: str) -> str:
    """What there is now and how to use it. Plain lines, so that none is broken when it is copied."""
    state = _short(settings.state_dir)
    lines = [""]
    if signed_in:
        token = (settings.state_dir / "dev-token").read_text()
        lines += [f"  Tailrace is ready after {seconds:.1f} s: {settings.url}/#token={token}", ""]
        lines += [f"  token     {state}/dev-token (user), {state}/admin-token (admin); more by `tailrace token`"]
    else:
        lines += [f"  Tailrace is ready after {seconds:.1f} s: {settings.url}/", ""]
    lines += [
        f"  gRPC      {settings.near_host}:{settings.gateway_port}",
        f'  database  psql "$(cat {state}/database-url)"',
        f"  logs      {state}/logs",
    ]
    if settings.otlp_endpoint:
        lines.append(f"  traces    go to {settings.otlp_endpoint}")
    else:
        lines.append(
            "  traces    are kept with every operation; OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 sends them to Jaeger too"
        )
    if not any(os.environ.get(name) for name in MODEL_VARIABLES):
        lines.append(
            "  model     extractive, which quotes your documents and costs nothing; set ANTHROPIC_API_KEY, OPENAI_API_KEY or GEMINI_API_KEY"
        )
    if note:
        lines.append(f"  sample    {note}")
    if signed_in:
        lines += ["", "  Three calls to copy:", "", *(f"{call}\n" for call in calls(settings))]
    lines += ["  Ctrl-C stops everything."]
    return "\n".join(lines)


def _short(path: Path) -> str:
    """`path` relative to where the user is, if it is below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
