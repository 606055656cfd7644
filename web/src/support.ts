// Where in a passage the support for a cited statement stands, so that the reader's eye finds it. Pure text work.

export interface Span {
  start: number;
  end: number;
}

const WORD = /[\p{L}\p{N}]+/gu;

/** The statement that ends where a marker stands: back to the end of the sentence before. */
export function statementBefore(text: string): string {
  const bare = text.replace(/\s+/g, " ").trim().replace(/[.!?]+$/, "");
  const boundaries = [...bare.matchAll(/[.!?:]["')\]]*\s+(?=[\p{Lu}\p{N}"'(])/gu)];
  const last = boundaries.at(-1);
  return last ? bare.slice(last.index + last[0].length) : bare;
}

/** The sentence of the passage that shares most words with the statement; none if nothing shares about half of them. */
export function findSupport(passage: string, statement: string): Span | undefined {
  const wanted = new Set(words(statement).filter((word) => word.length > 2));
  if (wanted.size < 2) return undefined;
  let best: Span | undefined;
  let bestScore = 0.45;
  for (const span of sentences(passage)) {
    const held = new Set(words(passage.slice(span.start, span.end)));
    const shared = [...wanted].filter((word) => held.has(word)).length;
    const score = shared / wanted.size;
    if (score > bestScore) [best, bestScore] = [span, score];
  }
  return best;
}

const FENCE = /^\s*(?:```|~~~)/;
const BLOCK_START = /^\s*(?:$|[-*+]\s|\d+[.)]\s|#|>|\||```|~~~)/;
const STANDS_ALONE = /^\s*(?:$|#|\||```|~~~)/;

/** The same text with hard-wrapped prose on one line. Every character keeps its place; lists, tables, code and headings keep their lines. */
export function unwrap(text: string): string {
  const [first = "", ...rest] = text.split("\n");
  let joined = first;
  let before = first;
  let fenced = FENCE.test(first);
  for (const line of rest) {
    joined += (fenced || STANDS_ALONE.test(before) || BLOCK_START.test(line) ? "\n" : " ") + line;
    if (FENCE.test(line)) fenced = !fenced;
    before = line;
  }
  return joined;
}

function words(text: string): string[] {
  return text.toLowerCase().match(WORD) ?? [];
}

function* sentences(text: string): Generator<Span> {
  const end = /[.!?]["')\]]*(?=\s|$)|\n{2,}|\n(?=\s*(?:[-*|#]|\d+\.)\s?)/g;
  let start = 0;
  for (const match of text.matchAll(end)) {
    const stop = match.index + match[0].length;
    yield* trimmed(text, start, stop);
    start = stop;
  }
  yield* trimmed(text, start, text.length);
}

function* trimmed(text: string, start: number, end: number): Generator<Span> {
  const slice = text.slice(start, end);
  const inner = slice.trim();
  if (inner) {
    const from = start + slice.indexOf(inner);
    yield { start: from, end: from + inner.length };
  }
}
