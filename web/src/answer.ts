// The life of one answer in the page: asked, read event by event, resumed when the connection breaks, stopped, ended. Nothing here draws.
import { computed, signal } from "@preact/signals";
import { ask, cancel, ProblemError, problemOf, type Question, resume } from "./api";
import { MarkdownStream } from "./markdown";
import { connected } from "./network";
import { events, type ServerEvent } from "./sse";
import type { Accepted, Citation, Done, Passage, Problem, Step } from "./wire";

export type Phase = "asking" | "streaming" | "reconnecting" | "done" | "stopped" | "failed";

/** What survives a reload of the page. An answer that was still running has an id and no end: it is resumed from its first event. */
export interface Saved {
  question: string;
  answerId: string;
  traceId: string;
  phase: "running" | "done" | "stopped" | "failed";
  text: string;
  steps: Step[];
  passages: Passage[];
  cited: number[];
  receipt: Done | undefined;
  problem: Problem | undefined;
}

/** Broken connections in a row, without a single event between them, before the page gives up. */
const ATTEMPTS_MAX = 7;
const BACKOFF_FIRST_MS = 400;
const BACKOFF_MAX_MS = 8_000;

/** How long the stream may take to end after a stop was accepted. */
const STOP_GRACE_MS = 4_000;

export class Answer {
  readonly question: string;
  readonly phase = signal<Phase>("asking");
  readonly stopping = signal(false);
  readonly text = signal("");
  readonly steps = signal<readonly Step[]>([]);
  readonly passages = signal<readonly Passage[]>([]);
  readonly cited = signal<ReadonlySet<number>>(new Set());
  readonly receipt = signal<Done | undefined>(undefined);
  readonly problem = signal<Problem | undefined>(undefined);
  readonly traceId = signal("");
  /** Set when the text does not hash to what the receipt says. */
  readonly mismatch = signal(false);

  readonly running = computed(() => ["asking", "streaming", "reconnecting"].includes(this.phase.value));
  readonly blocks = computed(() => (this.running.value ? this.#markdown.grow(this.text.value) : this.#markdown.finish(this.text.value)));

  readonly #markdown = new MarkdownStream((number) => this.passage(number)?.title);
  readonly #abort = new AbortController();
  #answerId = "";
  #acceptedAt = 0;
  #sequence = 0;
  #pending = "";
  #frame = 0;

  constructor(question: string) {
    this.question = question;
  }

  static restore(saved: Saved): Answer {
    const answer = new Answer(saved.question);
    answer.#answerId = saved.answerId;
    answer.traceId.value = saved.traceId;
    if (saved.phase === "running") {
      answer.phase.value = "reconnecting";
      return answer;
    }
    answer.passages.value = saved.passages;
    answer.cited.value = new Set(saved.cited);
    answer.steps.value = saved.steps;
    answer.receipt.value = saved.receipt;
    answer.problem.value = saved.problem;
    answer.text.value = saved.text;
    answer.phase.value = saved.phase;
    return answer;
  }

  save(): Saved {
    const phase = this.phase.value;
    return {
      question: this.question,
      answerId: this.#answerId,
      traceId: this.traceId.value,
      phase: phase === "done" || phase === "stopped" || phase === "failed" ? phase : "running",
      text: this.text.value,
      steps: [...this.steps.value],
      passages: [...this.passages.value],
      cited: [...this.cited.value],
      receipt: this.receipt.value,
      problem: this.problem.value,
    };
  }

  /** As the gateway knows it; empty until it was taken on. */
  get id(): string {
    return this.#answerId;
  }

  passage(number: number): Passage | undefined {
    return this.passages.value.find((passage) => passage.number === number);
  }

  /** Milliseconds since the question was taken on, by this page's clock. */
  elapsed(): number {
    return this.#acceptedAt ? performance.now() - this.#acceptedAt : 0;
  }

  /** Asks and reads to the end. `accepted` is told the conversation as soon as the gateway has named it. */
  async run(body: Question, accepted: (event: Accepted) => void): Promise<void> {
    // The same key again is the same answer, so a question whose reply was lost can be sent once more.
    const key = randomKey();
    await this.#read((signal) => ask(body, key, signal), accepted);
  }

  /** Goes on with an answer that an earlier page had asked for. */
  async continue(): Promise<void> {
    await this.#read((signal) => resume(this.#answerId, this.#sequence, signal), () => undefined);
  }

  async stop(): Promise<void> {
    if (!this.running.value || this.stopping.value) return;
    this.stopping.value = true;
    if (this.#answerId) await this.#cancel();
  }

  /** Lets go of the connection; the answer itself goes on for the gateway's grace time. */
  leave(): void {
    this.#abort.abort();
  }

  async #cancel(): Promise<void> {
    try {
      await cancel(this.#answerId);
      window.setTimeout(() => this.running.value && this.#end("stopped"), STOP_GRACE_MS);
    } catch (error) {
      this.stopping.value = false;
      // Already over: its end is on the way.
      if (!(error instanceof ProblemError && error.problem.status === 404)) this.problem.value = problemOf(error);
    }
  }

  async #read(first: (signal: AbortSignal) => Promise<Response>, accepted: (event: Accepted) => void): Promise<void> {
    let connect = first;
    for (let attempt = 0; this.running.value; attempt++) {
      const before = this.#sequence;
      try {
        const response = await connect(this.#abort.signal);
        if (response.status === 204) return this.#refused(LOST);
        for await (const event of events(response)) {
          this.#take(event, accepted);
          if (!this.running.value) return;
        }
      } catch (error) {
        if (this.#abort.signal.aborted) return;
        if (error instanceof ProblemError && !(this.#answerId && isPassing(error))) {
          return this.#refused(error.problem.status === 410 ? LOST : withWait(error));
        }
      }
      if (this.#sequence > before) attempt = 0;
      if (attempt + 1 >= (this.#answerId ? ATTEMPTS_MAX : 2)) return this.#refused(this.#answerId ? INTERRUPTED : problemOf(undefined));
      this.phase.value = this.#answerId ? "reconnecting" : "asking";
      await pause(Math.min(BACKOFF_FIRST_MS * 2 ** attempt, BACKOFF_MAX_MS), this.#abort.signal);
      if (this.#answerId) await connected(this.#abort.signal);
      if (this.#abort.signal.aborted) return;
      if (this.#answerId) connect = (signal) => resume(this.#answerId, this.#sequence, signal);
    }
  }

  #take({ name, id, data }: ServerEvent, accepted: (event: Accepted) => void): void {
    if (name === "error" || name === "cancelled") {
      const problem = JSON.parse(data) as Problem;
      // It may be the gateway that ends and not the answer: whoever resumes is told which.
      if (problem.reason === "ANSWER_INTERRUPTED" && this.#answerId) throw new Error("the stream was interrupted");
      return this.#refused(problem);
    }
    const sequence = Number(id);
    if (sequence <= this.#sequence) return;
    const event: unknown = JSON.parse(data);
    this.#sequence = sequence;
    if (this.phase.value !== "streaming") this.phase.value = "streaming";
    switch (name) {
      case "accepted":
        return this.#accept(event as Accepted, accepted);
      case "step":
        return this.#step(event as Step);
      case "passages":
        this.passages.value = (event as { passages: Passage[] }).passages;
        return;
      case "delta":
        return this.#append((event as { text: string }).text);
      case "citation":
        this.cited.value = new Set(this.cited.value).add((event as Citation).number);
        return;
      case "done":
        return this.#finish(event as Done);
    }
  }

  #accept(event: Accepted, accepted: (event: Accepted) => void): void {
    this.#answerId = event.answer_id;
    this.#acceptedAt = performance.now();
    this.traceId.value = event.trace_id;
    accepted(event);
    if (this.stopping.value) void this.#cancel();
  }

  #step(step: Step): void {
    const known = this.steps.value.some(({ name }) => name === step.name);
    this.steps.value = known ? this.steps.value.map((old) => (old.name === step.name ? step : old)) : [...this.steps.value, step];
  }

  /** The first text is shown at once; after it, what arrives within one frame is drawn together. */
  #append(text: string): void {
    this.#pending += text;
    if (this.text.value === "" || document.hidden) return this.#flush();
    this.#frame ||= requestAnimationFrame(() => this.#flush());
  }

  #flush(): void {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (!this.#pending) return;
    this.text.value += this.#pending;
    this.#pending = "";
  }

  #finish(receipt: Done): void {
    this.#flush();
    this.receipt.value = receipt;
    this.traceId.value = receipt.trace_id;
    this.#end("done");
    void this.#verify(receipt.text_sha256);
  }

  async #verify(expected: string): Promise<void> {
    // Only secure contexts (https, localhost) have it.
    if (!globalThis.crypto.subtle || !expected) return;
    const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(this.text.value));
    const hex = [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    this.mismatch.value = hex !== expected;
  }

  #refused(problem: Problem): void {
    if (problem.reason === "ANSWER_CANCELLED" || this.stopping.value) return this.#end("stopped");
    this.problem.value = problem;
    if (problem.trace_id) this.traceId.value = problem.trace_id;
    this.#end("failed");
  }

  #end(phase: "done" | "stopped" | "failed"): void {
    this.#flush();
    this.stopping.value = false;
    this.phase.value = phase;
    this.#abort.abort();
  }
}

const INTERRUPTED: Problem = {
  title: "The connection was interrupted",
  detail: "The page tried to go on with this answer and could not. What had arrived is kept.",
  retryable: true,
};

const LOST: Problem = {
  title: "The answer was interrupted",
  detail: "The rest of this answer is no longer kept. What had arrived is shown.",
  retryable: true,
};

/** Refusals of a resume that may be over in a moment. */
function isPassing(error: ProblemError): boolean {
  return [429, 502, 503, 504].includes(error.problem.status ?? 0);
}

function withWait(error: ProblemError): Problem {
  if (!error.retryAfterS) return error.problem;
  const wait = `Try again in ${error.retryAfterS} s.`;
  return { ...error.problem, detail: error.problem.detail ? `${error.problem.detail} ${wait}` : wait };
}

function randomKey(): string {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = window.setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (window.clearTimeout(timer), resolve()), { once: true });
  });
}
