// The tenant's documents: the list, uploads on their way, deletion. Nothing here draws.
import { batch, computed, signal } from "@preact/signals";
import { deleteDocument, listDocuments, ProblemError, problemOf, upload } from "./api";
import { bytes } from "./format";
import { signedIn } from "./identity";
import { events } from "./sse";
import { DOCUMENT_BYTES_MAX, type Problem, type Progress, type StoredDocument } from "./wire";

/** Files sent at the same time; the others wait their turn. */
const UPLOADS_AT_ONCE = 2;

/** How often one file is sent if the gateway asks to come back later. */
const ATTEMPTS_MAX = 10;

/** Uploads kept in view; the oldest ended ones go first. */
const UPLOADS_MAX = 200;

export type UploadState = "waiting" | "sending" | "held" | Progress["stage"] | "cancelled";

export class Upload {
  readonly name: string;
  readonly bytes: number;
  readonly state = signal<UploadState>("waiting");
  readonly chunks = signal({ done: 0, total: 0 });
  readonly failure = signal("");
  readonly unreadPages = signal("");
  readonly ended = computed(() => ["indexed", "unchanged", "failed", "cancelled"].includes(this.state.value));

  readonly #file: File;
  readonly #abort = new AbortController();

  constructor(file: File) {
    this.#file = file;
    this.name = file.name;
    this.bytes = file.size;
  }

  async run(): Promise<void> {
    if (this.ended.value) return;
    if (this.bytes > DOCUMENT_BYTES_MAX) return this.fail(`Larger than ${bytes(DOCUMENT_BYTES_MAX)}`);
    if (this.bytes === 0) return this.fail("The file is empty");
    for (let attempt = 1; ; attempt++) {
      this.state.value = "sending";
      try {
        const response = await upload(this.#file, this.#abort.signal);
        for await (const event of events(response)) this.#take(event.name, event.data);
        if (!this.ended.value) this.fail("The connection was interrupted; send the file again to see where it stands");
        return;
      } catch (error) {
        if (this.#abort.signal.aborted) return;
        const waitS = error instanceof ProblemError && attempt < ATTEMPTS_MAX ? error.retryAfterS : undefined;
        if (waitS === undefined) return this.#failed(problemOf(error));
        await this.#wait(waitS);
        if (this.#abort.signal.aborted) return;
      }
    }
  }

  /** Many files at once may meet a limit; the gateway says when it goes on. */
  async #wait(seconds: number): Promise<void> {
    this.state.value = "held";
    await new Promise<void>((resolve) => {
      const timer = window.setTimeout(resolve, seconds * 1000);
      this.#abort.signal.addEventListener("abort", () => (window.clearTimeout(timer), resolve()), { once: true });
    });
  }

  cancel(): void {
    if (this.ended.value) return;
    this.state.value = "cancelled";
    this.#abort.abort();
  }

  fail(why: string): void {
    batch(() => {
      this.failure.value = why;
      this.state.value = "failed";
    });
  }

  #failed(problem: Problem): void {
    this.fail(problem.detail || problem.title);
  }

  #take(name: string, data: string): void {
    if (name === "error") {
      this.#failed(JSON.parse(data) as Problem);
    } else if (name === "progress") {
      const progress = JSON.parse(data) as Progress;
      if (progress.stage === "failed") return this.fail(progress.error_detail);
      batch(() => {
        this.chunks.value = { done: progress.chunks_done, total: progress.chunks_total };
        this.unreadPages.value = progress.unread_pages;
        this.state.value = progress.stage;
      });
    }
  }
}

export const documents = signal<readonly StoredDocument[]>([]);
/** The collections that are known to hold something, the one that is asked by itself first. */
export const collections = computed(() => ["default", ...new Set(documents.value.map(({ collection }) => collection).filter((name) => name && name !== "default").sort())]);
export const documentsState = signal<"unknown" | "loading" | "ready" | "failed">("unknown");
export const documentsProblem = signal<Problem | undefined>(undefined);
export const nextPage = signal("");
export const uploads = signal<readonly Upload[]>([]);

/** Loads the first page of the list anew. */
export async function refresh(): Promise<void> {
  if (documentsState.peek() !== "ready") documentsState.value = "loading";
  await load("", () => []);
}

export async function loadMore(): Promise<void> {
  await load(nextPage.peek(), () => documents.peek());
}

async function load(pageToken: string, before: () => readonly StoredDocument[]): Promise<void> {
  try {
    const page = await listDocuments(pageToken);
    batch(() => {
      documents.value = [...before(), ...page.documents];
      nextPage.value = page.next_page_token ?? "";
      documentsProblem.value = undefined;
      documentsState.value = "ready";
    });
  } catch (error) {
    if (!signedIn.peek()) return;
    documentsProblem.value = problemOf(error);
    documentsState.value = "failed";
  }
}

/** Throws a ProblemError or a TypeError if the document is still there. */
export async function remove(document: StoredDocument): Promise<void> {
  await deleteDocument(document.document_id);
  documents.value = documents.peek().filter((other) => other.document_id !== document.document_id);
}

export function add(files: Iterable<File>): void {
  const added = [...files].map((file) => new Upload(file));
  const ended = uploads.peek().filter((one) => one.ended.peek());
  const surplus = new Set(ended.slice(0, Math.max(0, uploads.peek().length + added.length - UPLOADS_MAX)));
  uploads.value = [...uploads.peek().filter((one) => !surplus.has(one)), ...added];
  for (let lane = running; lane < UPLOADS_AT_ONCE; lane++) void drain();
}

export function forgetDocuments(): void {
  for (const one of uploads.peek()) one.cancel();
  batch(() => {
    uploads.value = [];
    documents.value = [];
    nextPage.value = "";
    documentsState.value = "unknown";
  });
}

export function clearEnded(): void {
  uploads.value = uploads.peek().filter((one) => !one.ended.peek());
}

let running = 0;

async function drain(): Promise<void> {
  running++;
  try {
    for (let next; (next = uploads.peek().find((one) => one.state.peek() === "waiting")); ) await next.run();
  } finally {
    running--;
  }
  if (running === 0) await refresh();
}
