// Where in a passage the support for a cited statement stands, so that the reader's eye finds it. Pure text work.

export interface Span {
  start: number;
  end: number;
}

const WORD = /[\p{L}\p{N}]+/gu;

/** The statement that ends where a marker stands: back to the end of the sentence before. */
export function statementBefore(text: string): string {
  const bare = text.replace(/\s+/g, " ").trim();
  return bare.slice(Math.max(0, ...sentenceEnds(bare))).replace(/[.!?]+$/, "");
}

/**
 * The sentence of the passage that shares most words with the statement, the shortest of such; none if nothing shares about half of them.
 * A row of a table is read with the names of its columns.
 */
export function findSupport(passage: string, statement: string): Span | undefined {
  const wanted = new Set(words(statement).filter((word) => word.length > 2));
  if (wanted.size < 2) return undefined;
  let best: Span | undefined;
  let bestScore = 0.45;
  let columns: string[] | undefined;
  for (const span of sentences(passage)) {
    const said = passage.slice(span.start, span.end);
    const held = new Set(words(said));
    if (!IS_ROW.test(said)) columns = undefined;
    else if (columns) for (const name of columns) held.add(name);
    else columns = [...held];
    const shared = [...wanted].filter((word) => held.has(word)).length;
    const score = shared / wanted.size - held.size / 10_000;
    if (score > bestScore) [best, bestScore] = [span, score];
  }
  return best;
}

const FENCE = /^\s*(?:```|~~~)/;
const ROW = String.raw`\||\S[^\n]* \| `;
const IS_ROW = new RegExp(`^(?:${ROW})`);
const BLOCK_START = new RegExp(String.raw`^\s*(?:$|[-*+•]\s|\d+[.)]\s|#|>|${ROW}|\`\`\`|~~~)`);
const STANDS_ALONE = new RegExp(String.raw`^\s*(?:$|#|${ROW}|\`\`\`|~~~)`);

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

// The same ends of sentences as the orchestrator sees, footnote marks being none of the text.
const SENTENCE_END = /(?<=[.!?。！？])["'”’)\]]*(?:\[\^?\d{1,3}\])*\s+(?=["'“‘([`]?[\p{Lu}\p{Lo}\p{N}`])/gu;
const ABBREVIATION = /(?:\b(?:e\.g|i\.e|etc|cf|vs|approx|no|nr|fig|mr|mrs|ms|dr|st|inc|ltd|co|z\.B|d\.h|bzw|usw)|\b[A-Z])\.$/i;
const ABBREVIATION_CHARACTERS_MAX = 16;

/** Where sentences end and others begin, within one paragraph. */
function* sentenceEnds(text: string): Generator<number> {
  for (const match of text.matchAll(SENTENCE_END)) {
    if (!ABBREVIATION.test(text.slice(Math.max(0, match.index - ABBREVIATION_CHARACTERS_MAX), match.index))) yield match.index + match[0].length;
  }
}

function* sentences(text: string): Generator<Span> {
  const breaks = [...text.matchAll(new RegExp(String.raw`\n{2,}|\n(?=\s*(?:[-*#•]|\d+[.)]|${ROW})\s?)`, "g"))].map(({ index }) => index);
  let start = 0;
  for (const stop of [...breaks, ...sentenceEnds(text), text.length].sort((one, other) => one - other)) {
    yield* trimmed(text, start, stop);
    start = stop;
  }
}

function* trimmed(text: string, start: number, end: number): Generator<Span> {
  const slice = text.slice(start, end);
  const inner = slice.trim();
  if (inner) {
    const from = start + slice.indexOf(inner);
    yield { start: from, end: from + inner.length };
  }
}
