import { useEffect, useRef } from "preact/hooks";
import { useSignal, useSignalEffect } from "@preact/signals";
import { answers, ask, busy, choose, collection, draft, openPassage, startNew } from "../conversation";
import { collections, documents, documentsState, refresh } from "../documents";
import { plural } from "../format";
import { QUESTION_BYTES_MAX } from "../wire";
import { Send, Stop } from "./icons";
import { PassagePanel } from "./passage";
import { Turn } from "./turn";

export function AskView() {
  const latest = useFollow();
  useShortcuts();
  useEffect(() => {
    if (documentsState.peek() === "unknown") void refresh();
  }, []);
  const empty = answers.value.length === 0;
  return (
    <main class={empty ? "ask empty" : "ask"}>
      {empty ? (
        <Welcome key="welcome" />
      ) : (
        <div key="log" class="log" role="log" aria-live="off" aria-label="Conversation">
          {answers.value.map((answer) => (
            <Turn key={answer} answer={answer} />
          ))}
        </div>
      )}
      <Announcer />
      {/* By key, or the log would take over its element, and the box be made anew without what is typed just then. */}
      <div key="dock" class="dock">
        {latest.away.value && (
          <button type="button" class="latest" onClick={latest.jump}>
            Jump to the latest
          </button>
        )}
        <Composer />
      </div>
      <PassagePanel />
    </main>
  );
}

/** Answered by the project's own documents, which the first start puts in; `make run` prints the same question. */
const SAMPLE_QUESTION = "What happens when a client disconnects during an answer?";

function Welcome() {
  const sample = documents.value.some(({ source_uri, title }) => source_uri === "README.md" && title.startsWith("Tailrace"));
  const total = documents.value.length;
  return (
    <div class="welcome">
      <h1>Ask your documents</h1>
      <p>Every answer arrives with the passages it rests on, the steps it took and what it cost.</p>
      {documentsState.value === "ready" && (
        <p class="fine">
          {total === 0 ? (
            <>
              Nothing is indexed yet. <a href="#documents">Add documents</a> to begin.
            </>
          ) : (
            <a href="#documents">{plural(total, "document")} indexed</a>
          )}
        </p>
      )}
      {sample && (
        <button type="button" class="suggestion" onClick={() => ask(SAMPLE_QUESTION)}>
          {SAMPLE_QUESTION}
        </button>
      )}
    </div>
  );
}

function Composer() {
  const box = useRef<HTMLTextAreaElement>(null);
  const text = draft.value;
  const bytes = new TextEncoder().encode(text).length;
  const tooLong = bytes > QUESTION_BYTES_MAX;
  const sendable = text.trim() !== "" && !tooLong && !busy.value;
  const stop = () => void answers.value.at(-1)?.stop();
  const send = () => {
    if (!sendable) return;
    void ask(text.trim());
    draft.value = "";
  };
  const key = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape" && busy.value) {
      event.stopPropagation();
      stop();
    }
  };
  useEffect(() => box.current?.focus(), []);
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <label class="sr-only" for="question">
        Question
      </label>
      <textarea
        id="question"
        ref={box}
        rows={1}
        placeholder={answers.value.length ? "Ask a follow-up" : "Ask a question"}
        aria-describedby="composer-hint"
        aria-invalid={tooLong}
        value={text}
        onInput={(event) => (draft.value = event.currentTarget.value)}
        onKeyDown={key}
      />
      {busy.value ? (
        <button type="button" class="round" onClick={stop} disabled={answers.value.at(-1)?.stopping.value ?? false} aria-label="Stop the answer" title="Stop (Esc)">
          <Stop />
        </button>
      ) : (
        <button type="submit" class="round" disabled={!sendable} aria-label="Send the question" title="Send (Enter)">
          <Send />
        </button>
      )}
      <p id="composer-hint" class={tooLong ? "hint bad" : "hint"}>
        {tooLong ? (
          `Too long by ${plural(bytes - QUESTION_BYTES_MAX, "byte")}`
        ) : (
          <>
            <kbd>Enter</kbd> sends · <kbd>Shift</kbd> <kbd>Enter</kbd> new line · <kbd>Esc</kbd> stops
          </>
        )}
      </p>
      <Collection />
    </form>
  );
}

/** Only where there is something to choose. */
function Collection() {
  const names = collections.value.includes(collection.value) ? collections.value : [...collections.value, collection.value];
  if (names.length < 2) return null;
  return (
    <label class="collection">
      <span>Collection</span>
      <select value={collection.value} onChange={(event) => choose(event.currentTarget.value)}>
        {names.map((name) => (
          <option key={name} value={name}>
            {name}
          </option>
        ))}
      </select>
    </label>
  );
}

/** Tells screen readers of an answer once, when it has ended, and not at every token. */
function Announcer() {
  const message = useSignal("");
  useSignalEffect(() => {
    const answer = answers.value.at(-1);
    if (!answer) message.value = "";
    else if (answer.running.value) message.value = answer.phase.value === "reconnecting" ? "Reconnecting" : "Answering";
    else if (answer.phase.value === "failed") message.value = `The answer failed. ${answer.problem.value?.title ?? ""}`;
    else message.value = `${answer.phase.value === "stopped" ? "Stopped" : "Answer complete"}. ${answer.text.value.replace(/[*_`#]/g, "")}`;
  });
  return (
    <div class="sr-only" role="status" aria-live="polite">
      {message.value}
    </div>
  );
}

/** Keeps the end of a growing answer in view, but only for a reader who is there already. */
function useFollow() {
  const away = useSignal(false);
  useEffect(() => {
    const root = document.documentElement;
    let following = true;
    let height = root.scrollHeight;
    const distance = () => root.scrollHeight - root.clientHeight - root.scrollTop;
    const onScroll = () => {
      // Content that grew moved the end away; only a person's scrolling ends the following.
      if (root.scrollHeight === height) following = distance() < 48;
      away.value = !following && distance() > 240;
    };
    const grown = new ResizeObserver(() => {
      height = root.scrollHeight;
      if (following && busy.peek()) root.scrollTop = root.scrollHeight;
      away.value = !following && distance() > 240;
    });
    grown.observe(document.body);
    const stop = answers.subscribe(() => {
      following = true;
      requestAnimationFrame(() => (root.scrollTop = root.scrollHeight));
    });
    window.addEventListener("scroll", onScroll, { passive: true });
    return () => {
      grown.disconnect();
      stop();
      window.removeEventListener("scroll", onScroll);
    };
  }, []);
  return { away, jump: () => window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "smooth" }) };
}

function useShortcuts() {
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key === "Escape" && openPassage.peek()) openPassage.value = undefined;
      else if (event.key === "Escape" && busy.peek()) void answers.peek().at(-1)?.stop();
      else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.code === "KeyO") {
        event.preventDefault();
        startNew();
        document.getElementById("question")?.focus();
      }
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);
}
