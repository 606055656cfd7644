import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { problemOf, sessionPath } from "../api";
import { busy } from "../conversation";
import { day, plural } from "../format";
import { drop, loadMoreSessions, moreSessions, refreshSessions, rename, sessions, sessionsProblem, sessionsState, takeUp } from "../sessions";
import type { Session } from "../wire";

const TITLE_CHARACTERS_MAX = 120;

export function ConversationsView() {
  useEffect(() => void refreshSessions(), []);
  return (
    <main class="documents conversations">
      <h1>Conversations</h1>
      <List />
    </main>
  );
}

function List() {
  if (sessionsState.value === "failed") {
    return (
      <div class="notice bad" role="alert">
        <strong>{sessionsProblem.value?.title}</strong>
        <p>{sessionsProblem.value?.detail}</p>
        <button type="button" class="secondary" onClick={refreshSessions}>
          Retry
        </button>
      </div>
    );
  }
  if (sessionsState.value !== "ready") return <p class="fine">Loading…</p>;
  if (!sessions.value.length) return <p class="fine">Nothing was asked yet.</p>;
  return (
    <section aria-label="Conversations, latest first">
      <ul class="rows">
        {sessions.value.map((session) => (
          <Row key={session.session_id} session={session} />
        ))}
      </ul>
      {moreSessions.value && (
        <button type="button" class="secondary" onClick={loadMoreSessions}>
          Show more
        </button>
      )}
      <p class="fine">
        <a href="/v1/sessions:export" download="conversations.ndjson">
          Export all
        </a>
      </p>
    </section>
  );
}

function Row({ session }: { session: Session }) {
  const doing = useSignal<"nothing" | "renaming" | "deleting">("nothing");
  const working = useSignal(false);
  const failure = useSignal("");
  const title = useSignal("");
  const attempt = async (work: () => Promise<void>) => {
    working.value = true;
    failure.value = "";
    try {
      await work();
      doing.value = "nothing";
    } catch (error) {
      const problem = problemOf(error);
      failure.value = problem.detail || problem.title;
    }
    working.value = false;
  };
  const open = () =>
    attempt(async () => {
      await takeUp(session);
      location.hash = "";
    });
  const shown = session.title.trim() || "Untitled";
  if (doing.value === "renaming") {
    const wanted = title.value.trim();
    return (
      <li class="row">
        <form
          class="row-main rename"
          onSubmit={(event) => {
            event.preventDefault();
            if (wanted) void attempt(() => rename(session, wanted));
          }}
        >
          <input aria-label="Title" autofocus maxLength={TITLE_CHARACTERS_MAX} value={title.value} onInput={(event) => (title.value = event.currentTarget.value)} />
          <button type="submit" class="secondary" disabled={working.value || !wanted}>
            Save
          </button>
          <button type="button" class="quiet" onClick={() => (doing.value = "nothing")}>
            Keep
          </button>
          {failure.value && <p class="upload-failure">{failure.value}</p>}
        </form>
      </li>
    );
  }
  return (
    <li class="row">
      <div class="row-main">
        <button type="button" class="row-title row-open" disabled={busy.value || working.value} onClick={open}>
          {shown}
        </button>
        <span class="row-facts">
          <span>{plural(session.turns, "turn")}</span>
          <span>{day(session.updated_at)}</span>
        </span>
        {failure.value && <p class="upload-failure">{failure.value}</p>}
      </div>
      {doing.value === "deleting" ? (
        <span class="row-sure">
          <button type="button" class="danger" disabled={working.value} onClick={() => attempt(() => drop(session))} autofocus>
            {working.value ? "Deleting…" : "Delete for good"}
          </button>
          <button type="button" class="quiet" disabled={working.value} onClick={() => (doing.value = "nothing")}>
            Keep
          </button>
        </span>
      ) : (
        <span class="row-sure">
          <a class="quiet" href={`${sessionPath(session.session_id)}/export`} download="conversation.md" aria-label={`Export ${shown}`}>
            Export
          </a>
          <button
            type="button"
            class="quiet"
            aria-label={`Rename ${shown}`}
            onClick={() => {
              title.value = session.title.slice(0, TITLE_CHARACTERS_MAX);
              doing.value = "renaming";
            }}
          >
            Rename
          </button>
          <button type="button" class="quiet" aria-label={`Delete ${shown}`} onClick={() => (doing.value = "deleting")}>
            Delete
          </button>
        </span>
      )}
    </li>
  );
}
