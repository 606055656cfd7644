// A passage as it reads, Markdown as what it means and any other text as it stands, with what bears out a statement marked. Safe HTML.
import { escape, safe, unsafeHtml } from "./markdown";
import { findSupport, unwrap } from "./support";
import type { Passage } from "./wire";

const MARKDOWN = /\.(?:md|markdown|mdown|mdx)$/i;
const FENCE = /^ {0,3}(?:`{3,}|~{3,})[ \t]*(.*)$/gm;
const LEAF = "p, li, td, th, h1, h2, h3, h4, h5, h6, pre, blockquote, .verbatim";

/** The passage's text as HTML. `statement` is what an answer says of it; empty marks nothing. */
export function passageHtml(passage: Passage, statement: string): string {
  const inert = document.createElement("template");
  inert.innerHTML = MARKDOWN.test(passage.source_uri)
    ? unsafeHtml(fenced(passage.text))
    : `<div class="verbatim">${escape(unwrap(passage.text))}</div>`;
  if (statement) markSupport(inert.content, statement);
  return safe(inert.innerHTML);
}

/** A text that begins within a block of code, which the first fence then closes, gets the fence that it lacks. */
function fenced(text: string): string {
  const fences = [...text.matchAll(FENCE)];
  return fences.length % 2 === 1 && fences[0]?.[1] === "" ? `\`\`\`\n${text}` : text;
}

/** Wraps what bears out `statement` in marks, one for each run of text of its own style. */
function markSupport(root: DocumentFragment, statement: string): void {
  const runs: { node: Text; start: number }[] = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  let text = "";
  let leaf: Element | null | undefined;
  while (walker.nextNode()) {
    const node = walker.currentNode as Text;
    const parent = node.parentElement;
    if (parent?.closest(".code-head") || parent?.matches("table, thead, tbody, tr")) continue;
    if (!parent?.closest("pre, .verbatim")) node.data = node.data.replace(/\s+/g, " ");
    const own = parent?.closest(LEAF);
    // A row is read as in a plain text.
    if (own !== leaf) text += own?.closest("tr") && own.closest("tr") === leaf?.closest("tr") ? " | " : "\n\n";
    leaf = own;
    runs.push({ node, start: text.length });
    text += node.data;
  }
  const span = findSupport(text, statement);
  if (!span) return;
  for (const { node, start } of runs) {
    const [from, to] = [Math.max(span.start - start, 0), Math.min(span.end - start, node.length)];
    if (from >= to || !node.data.slice(from, to).trim()) continue;
    const marked = from ? node.splitText(from) : node;
    if (to - from < marked.length) marked.splitText(to - from);
    const mark = document.createElement("mark");
    marked.replaceWith(mark);
    mark.append(marked);
  }
}
