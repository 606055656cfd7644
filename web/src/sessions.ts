// The user's conversations: the list, taking one up again, another title, deletion. Nothing here draws.
import { signal } from "@preact/signals";
import { deleteSession, listSessions, problemOf, readSession, renameSession } from "./api";
import { busy, isOnShow, show, startNew } from "./conversation";
import type { Problem, Session } from "./wire";

export const sessions = signal<readonly Session[]>([]);
export const sessionsState = signal<"unknown" | "loading" | "ready" | "failed">("unknown");
export const sessionsProblem = signal<Problem | undefined>(undefined);
export const moreSessions = signal("");

/** Counts what was forgotten: a list that was asked for before belongs to somebody else. */
let generation = 0;

export async function refreshSessions(): Promise<void> {
  sessionsState.value = "loading";
  await load("");
}

export async function loadMoreSessions(): Promise<void> {
  await load(moreSessions.value);
}

async function load(pageToken: string): Promise<void> {
  const mine = generation;
  try {
    const page = await listSessions(pageToken);
    if (mine !== generation) return;
    sessions.value = pageToken ? [...sessions.value, ...page.sessions] : page.sessions;
    moreSessions.value = page.next_page_token;
    sessionsState.value = "ready";
  } catch (error) {
    if (mine !== generation) return;
    sessionsProblem.value = problemOf(error);
    sessionsState.value = "failed";
  }
}

/** Puts a conversation on show. An answer that is under way stays where it is. */
export async function takeUp(session: Session): Promise<void> {
  if (busy.value || isOnShow(session.session_id)) return;
  const mine = generation;
  const kept = await readSession(session.session_id);
  if (mine === generation && !busy.value) show(kept);
}

export async function rename(session: Session, title: string): Promise<void> {
  const renamed = await renameSession(session.session_id, title);
  sessions.value = sessions.value.map((one) => (one.session_id === session.session_id ? { ...one, title: renamed.title } : one));
}

export async function drop(session: Session): Promise<void> {
  await deleteSession(session.session_id);
  if (isOnShow(session.session_id)) startNew();
  sessions.value = sessions.value.filter((one) => one.session_id !== session.session_id);
}

export function forgetSessions(): void {
  generation++;
  sessions.value = [];
  moreSessions.value = "";
  sessionsState.value = "unknown";
}
