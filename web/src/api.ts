// Calls to the gateway. Every refusal becomes a ProblemError; a network failure stays the TypeError that fetch throws.
import { expire, OWN_REQUEST, SIGNED_OUT } from "./identity";
import { unreachable } from "./network";
import { readProblem } from "./problem";
import type { DocumentPage, KeptSession, Problem, Session, SessionPage } from "./wire";

export class ProblemError extends Error {
  readonly problem: Problem;
  /** Seconds after which it makes sense to try again, if the gateway said so. */
  readonly retryAfterS: number | undefined;

  constructor(problem: Problem, retryAfterS?: number) {
    super(problem.title);
    this.problem = problem;
    this.retryAfterS = retryAfterS;
  }
}

export interface Question {
  question: string;
  session_id: string;
  collection?: string;
  cache?: "use" | "refresh" | "off";
  /** The answer whose turn this one takes the place of. */
  replaces?: string;
}

export function ask(body: Question, idempotencyKey: string, signal: AbortSignal): Promise<Response> {
  return call("/v1/answers", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream", "idempotency-key": idempotencyKey },
    body: JSON.stringify(body),
    signal,
  });
}

export function resume(answerId: string, lastEventId: number, signal: AbortSignal): Promise<Response> {
  return call(`/v1/answers/${encodeURIComponent(answerId)}/events`, {
    headers: { accept: "text/event-stream", "last-event-id": String(lastEventId) },
    signal,
  });
}

export async function cancel(answerId: string): Promise<void> {
  await call(`/v1/answers/${encodeURIComponent(answerId)}/cancel`, { method: "POST" });
}

export function upload(file: File, signal: AbortSignal): Promise<Response> {
  const form = new FormData();
  form.append("files", file, file.name);
  return call("/v1/documents", { method: "POST", headers: { accept: "text/event-stream" }, body: form, signal });
}

export async function listDocuments(pageToken: string): Promise<DocumentPage> {
  const query = new URLSearchParams({ page_size: "100" });
  if (pageToken) query.set("page_token", pageToken);
  const response = await call(`/v1/documents?${query}`, { headers: { accept: "application/json" } });
  return (await response.json()) as DocumentPage;
}

export async function deleteDocument(documentId: string): Promise<void> {
  await call(`/v1/documents/${encodeURIComponent(documentId)}`, { method: "DELETE" });
}

export async function listSessions(pageToken: string): Promise<SessionPage> {
  const query = new URLSearchParams({ page_size: "50" });
  if (pageToken) query.set("page_token", pageToken);
  const response = await call(`/v1/sessions?${query}`, { headers: { accept: "application/json" } });
  return (await response.json()) as SessionPage;
}

export async function readSession(sessionId: string): Promise<KeptSession> {
  const response = await call(sessionPath(sessionId), { headers: { accept: "application/json" } });
  return (await response.json()) as KeptSession;
}

export async function renameSession(sessionId: string, title: string): Promise<Session> {
  const init = { method: "PATCH", headers: { "content-type": "application/json" }, body: JSON.stringify({ title }) };
  return (await (await call(sessionPath(sessionId), init)).json()) as Session;
}

export async function deleteSession(sessionId: string): Promise<void> {
  await call(sessionPath(sessionId), { method: "DELETE" });
}

export function sessionPath(sessionId: string): string {
  return `/v1/sessions/${encodeURIComponent(sessionId)}`;
}

/** A problem document out of anything that was thrown. */
export function problemOf(error: unknown): Problem {
  if (error instanceof ProblemError) return error.problem;
  return unreachable();
}

async function call(path: string, init: RequestInit): Promise<Response> {
  const response = await fetch(path, { ...init, headers: { ...(init.headers as Record<string, string>), ...OWN_REQUEST }, cache: "no-store" });
  if (response.ok) return response;
  let problem = await readProblem(response);
  if (response.status === 401) {
    problem = { ...problem, ...SIGNED_OUT };
    expire(`${SIGNED_OUT.title}. ${SIGNED_OUT.detail}`);
  }
  const retryAfter = Number(response.headers.get("retry-after"));
  throw new ProblemError(problem, retryAfter > 0 ? retryAfter : undefined);
}
