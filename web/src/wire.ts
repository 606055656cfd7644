// What the gateway sends: proto3 JSON with the contract's names, where an int64 is a string. No behaviour lives here.

export interface Accepted {
  answer_id: string;
  session_id: string;
  trace_id: string;
}

export type StepStatus = "running" | "done" | "skipped" | "failed";

export interface Step {
  name: string;
  status: StepStatus;
  started_ms: number;
  duration_ms: number;
  facts: Record<string, string>;
}

export interface Passage {
  number: number;
  document_id: string;
  chunk_id: string;
  title: string;
  source_uri: string;
  text: string;
  start: string;
  end: string;
  score: number;
  heading_path: string[];
  document_version: string;
  /** From 1; 0 = the document has no pages. */
  page?: number;
  /** What makes it look like an instruction to the model. */
  flags?: string[];
}

export interface Citation {
  number: number;
}

export interface Usage {
  input_tokens: string;
  output_tokens: string;
  cache_read_tokens: string;
  cache_write_tokens: string;
}

export interface Cache {
  verdict: "miss" | "exact" | "semantic" | "coalesced" | "off";
  similarity?: number;
  source_question?: string;
  age_s?: string;
  saved_nanousd: string;
  reason: string;
}

export interface Done {
  answer_id: string;
  text_sha256: string;
  usage?: Usage;
  cost_nanousd: string;
  model: string;
  tier: string;
  finish_reason: string;
  cache?: Cache;
  trace_id: string;
  estimated: boolean;
  verdict: string;
  first_token_ms: number;
  duration_ms: number;
  provider: string;
}

/** RFC 9457, with the members that Tailrace adds. */
export interface Problem {
  type?: string;
  title: string;
  status?: number;
  detail?: string;
  reason?: string;
  retryable?: boolean;
  trace_id?: string;
}

/** A conversation, as the list has it. */
export interface Session {
  session_id: string;
  title: string;
  updated_at: string;
  turns: number;
}

export interface SessionPage {
  sessions: Session[];
  next_page_token: string;
}

export interface KeptTurn {
  answer_id: string;
  question: string;
  text: string;
  citations: Passage[];
  complete: boolean;
}

/** A conversation with the turns of its current branch, in the place of their number. */
export interface KeptSession extends Omit<Session, "turns"> {
  turns: KeptTurn[];
}

export interface Progress {
  job_id: string;
  index: number;
  name: string;
  document_id: string;
  stage: "received" | "parsed" | "chunked" | "embedded" | "indexed" | "unchanged" | "failed";
  bytes: string;
  chunks_total: number;
  chunks_done: number;
  version: string;
  error_reason: string;
  error_detail: string;
  /** Pages that are pictures and were not read, such as `2-4, 9`. */
  unread_pages: string;
}

export interface StoredDocument {
  document_id: string;
  title: string;
  source_uri: string;
  collection: string;
  media_type: string;
  version: string;
  bytes: string;
  characters: string;
  chunks: number;
  indexed_at: string;
  /** As in Progress. */
  unread_pages: string;
}

export interface DocumentPage {
  documents: StoredDocument[];
  next_page_token?: string;
}

/** Largest question, in UTF-8 bytes. */
export const QUESTION_BYTES_MAX = 32_768;

/** Largest document, in bytes. */
export const DOCUMENT_BYTES_MAX = 20 * 1024 * 1024;
