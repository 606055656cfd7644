// The conversation on show: its answers in order, kept for this tab across a reload.
import { computed, signal } from "@preact/signals";
import { Answer, type Saved } from "./answer";
import { owner } from "./identity";
import type { Question } from "./api";
import type { KeptSession } from "./wire";

const KEY = "tailrace.conversation";
const COLLECTION_KEY = "tailrace.collection";
const DEFAULT_COLLECTION = "default";

/** Older answers leave the page (not the ledger) beyond this. */
const ANSWERS_MAX = 50;

export const answers = signal<readonly Answer[]>([]);

/** The passage on show and the place it was opened from. */
export const openPassage = signal<{ answer: Answer; number: number; statement: string; opener: HTMLElement } | undefined>(undefined);

export const busy = computed(() => answers.value.at(-1)?.running.value ?? false);

/** What is being typed; survives everything but the tab. */
export const draft = signal("");

/** Which documents are asked; survives a reload of the tab. */
export const collection = signal(DEFAULT_COLLECTION);

export function choose(name: string): void {
  collection.value = name;
  sessionStorage.setItem(COLLECTION_KEY, JSON.stringify({ owner: owner.peek(), name }));
}

export function forgetCollection(): void {
  collection.value = DEFAULT_COLLECTION;
  sessionStorage.removeItem(COLLECTION_KEY);
}

let sessionId = "";

export function ask(question: string, cache: Question["cache"] = "use"): Promise<void> {
  return run({ question, session_id: sessionId, cache }, answers.value);
}

/** Asks again, or something else, in the place of an answer: it and what came after it leave the page for a branch of their own. */
export function askInstead(answer: Answer, question: string): Promise<void> {
  const before = answers.value.slice(0, answers.value.indexOf(answer));
  return run({ question, session_id: sessionId, replaces: answer.id }, before);
}

async function run(body: Question, before: readonly Answer[]): Promise<void> {
  if (busy.value) return;
  const answer = new Answer(body.question);
  const shown = answers.value;
  openPassage.value = undefined;
  answers.value = [...before.slice(1 - ANSWERS_MAX), answer];
  const wanted = collection.peek() === DEFAULT_COLLECTION ? {} : { collection: collection.peek() };
  await answer.run({ ...body, ...wanted }, ({ session_id }) => {
    sessionId = session_id;
    save();
  });
  if (!answer.id && answer.problem.value?.status === 401 && answers.value.at(-1) === answer) {
    // Nobody was signed in to ask: the question goes back to where it was typed.
    answers.value = shown;
    draft.value ||= body.question;
  }
  save();
}

/** Shows a conversation of before, to go on with. */
export function show(session: KeptSession): void {
  startNew();
  sessionId = session.session_id;
  answers.value = session.turns.slice(-ANSWERS_MAX).map((turn) =>
    Answer.restore({
      question: turn.question,
      answerId: turn.answer_id,
      traceId: "",
      phase: "done",
      text: turn.text,
      steps: [],
      passages: turn.citations,
      cited: turn.citations.map(({ number }) => number),
      receipt: undefined,
      problem: undefined,
    }),
  );
  save();
}

/** Whether a conversation is the one on show. */
export function isOnShow(id: string): boolean {
  return id === sessionId;
}

/** Asks again in place of an answer that failed or was stopped. */
export function retry(answer: Answer): void {
  if (busy.value) return;
  answers.value = answers.value.filter((other) => other !== answer);
  void ask(answer.question);
}

export function startNew(): void {
  for (const answer of answers.peek()) answer.leave();
  answers.value = [];
  openPassage.value = undefined;
  sessionId = "";
  sessionStorage.removeItem(KEY);
}

/** Brings back what this tab showed before a reload, and goes on with an answer that was still on its way. */
export function restore(): void {
  try {
    const chosen = JSON.parse(sessionStorage.getItem(COLLECTION_KEY) ?? "null") as { owner: string; name: string } | null;
    if (chosen?.owner === owner.peek()) collection.value = chosen.name;
    const saved = JSON.parse(sessionStorage.getItem(KEY) ?? "null") as { owner: string; sessionId: string; answers: Saved[] } | null;
    if (saved?.owner !== owner.peek()) return startNew();
    sessionId = saved.sessionId;
    answers.value = saved.answers.filter(({ answerId, phase }) => answerId || phase !== "running").map((one) => Answer.restore(one));
  } catch {
    sessionStorage.removeItem(KEY);
    return;
  }
  const last = answers.value.at(-1);
  if (last?.running.value) void last.continue().then(save);
}

function save(): void {
  if (!answers.value.length) return;
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ owner: owner.peek(), sessionId, answers: answers.value.map((answer) => answer.save()) }));
  } catch {
    // The tab's storage is full: the conversation goes on, only a reload would lose it.
    sessionStorage.removeItem(KEY);
  }
}
