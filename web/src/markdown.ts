// Untrusted Markdown to safe HTML, block by block. What a model writes can never run, load or submit anything:
// raw HTML is shown as text, images become their alternative text, links are absolute http(s) or mailto, and DOMPurify has the last word.
import DOMPurify from "dompurify";
import { Marked, type Token, type Tokens } from "marked";

export interface Block {
  /** Stays the same while the block's place in the text does, so that finished blocks are not drawn again. */
  key: number;
  html: string;
}

const purifier = DOMPurify();

const entities: Record<string, string> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
export const escape = (text: string) => text.replace(/[&<>"']/g, (character) => entities[character] ?? "");

const SAFE_ADDRESS = /^(?:https?:\/\/|mailto:)/i;
const MARKER = /^ ?\[(\d{1,2}(?:\s*,\s*\d{1,2})*)\](?!\()/;

/** A chip stays on the line of the word it belongs to, and the punctuation after it too. */
const tied = (html: string) =>
  html.replace(/(?<=[\s>])([^\s<>]{1,24})((?:<button type="button" class="cite"[^>]*>\d+<\/button>)+[.,;:!?)]?)/g, '<span class="tied">$1$2</span>');

/** The last word on any HTML that is shown. */
export function safe(html: string): string {
  return purifier.sanitize(tied(html), {
    ALLOWED_TAGS: [
      ...["p", "br", "hr", "strong", "em", "del", "mark", "code", "pre", "blockquote", "ul", "ol", "li", "a", "button", "span", "div"],
      ...["h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"],
    ],
    ALLOWED_ATTR: ["href", "rel", "target", "class", "type", "start", "align", "tabindex", "data-number", "data-copy", "aria-label"],
    ALLOW_DATA_ATTR: false,
    ALLOWED_URI_REGEXP: SAFE_ADDRESS,
    ADD_URI_SAFE_ATTR: ["rel", "target", "type", "start", "align", "tabindex", "data-number", "data-copy", "aria-label"],
  });
}

/** Renders one answer as it grows. `titleOf` names the passage behind a number; a number without one is plain text. */
export class MarkdownStream {
  readonly #marked: Marked;
  #settled: Block[] = [];
  #settledLength = 0;

  constructor(titleOf: (number: number) => string | undefined) {
    this.#marked = new Marked({ gfm: true });
    this.#marked.use({ extensions: [citation(titleOf)], renderer });
  }

  /** Blocks of a text that may still grow. Only the last two are rendered again; what is unfinished in them is shown as if it were closed. */
  grow(text: string): Block[] {
    this.#settle(this.#marked.lexer(text.slice(this.#settledLength)));
    const open = text.slice(this.#settledLength);
    const tokens = this.#marked.lexer(open);
    const inCode = tokens.at(-1)?.type === "code";
    return [...this.#settled, ...this.#render(inCode ? tokens : this.#marked.lexer(heal(open)))];
  }

  /** Blocks of a finished text. Rendered as a whole, so that reference links find their definitions. */
  finish(text: string): Block[] {
    this.#settled = [];
    this.#settledLength = 0;
    return this.#render(this.#marked.lexer(text));
  }

  #settle(tokens: Token[]): void {
    const lastTwo = tokens.filter(isBlock).slice(-2);
    const open = lastTwo[0] ? tokens.indexOf(lastTwo[0]) : 0;
    const settled = tokens.slice(0, open);
    this.#settled = [...this.#settled, ...this.#render(settled)];
    for (const token of settled) this.#settledLength += token.raw.length;
  }

  #render(tokens: Token[]): Block[] {
    const first = this.#settled.length;
    return tokens.filter(isBlock).map((token, index) => ({ key: first + index, html: safe(this.#marked.parser([token])) }));
  }
}

/** A whole Markdown text without citations, not yet safe. */
export const unsafeHtml = (text: string) => plainMarked.parse(text, { async: false });

const isBlock = (token: Token) => token.type !== "space" && token.type !== "def";

const renderer = {
  html({ text }: Tokens.HTML | Tokens.Tag) {
    return escape(text);
  },
  image({ text }: Tokens.Image) {
    return text ? `<span class="image-text">${escape(text)}</span>` : "";
  },
  link(this: { parser: { parseInline(tokens: Token[]): string } }, { href, tokens }: Tokens.Link) {
    const inner = this.parser.parseInline(tokens);
    if (!SAFE_ADDRESS.test(href)) return inner;
    return `<a href="${escape(href)}" target="_blank" rel="noopener noreferrer">${inner}</a>`;
  },
  code({ text, lang }: Tokens.Code) {
    const language = /^[\w+#.-]+/.exec(lang ?? "")?.[0] ?? "";
    return (
      `<div class="code"><div class="code-head"><span>${escape(language) || "text"}</span>` +
      `<button type="button" class="quiet" data-copy="code">Copy</button></div><pre tabindex="0"><code>${escape(text)}</code></pre></div>`
    );
  },
  table(this: { parser: { parseInline(tokens: Token[]): string } }, { header, rows }: Tokens.Table) {
    const cell = (tag: string) => (cell: Tokens.TableCell) =>
      `<${tag}${cell.align ? ` align="${cell.align}"` : ""}>${this.parser.parseInline(cell.tokens)}</${tag}>`;
    const body = rows.map((row) => `<tr>${row.map(cell("td")).join("")}</tr>`).join("");
    return `<div class="table" tabindex="0"><table><thead><tr>${header.map(cell("th")).join("")}</tr></thead><tbody>${body}</tbody></table></div>`;
  },
  checkbox({ checked }: Tokens.Checkbox) {
    return checked ? "☑ " : "☐ ";
  },
};

const plainMarked = new Marked({ gfm: true }).use({ renderer });

function citation(titleOf: (number: number) => string | undefined) {
  return {
    name: "citation",
    level: "inline" as const,
    start: (source: string) => {
      const at = source.search(/ ?\[\d/);
      return at < 0 ? undefined : at;
    },
    tokenizer(source: string) {
      const match = MARKER.exec(source);
      if (!match?.[1]) return undefined;
      const numbers = match[1].split(",").map(Number);
      return numbers.every((number) => titleOf(number) !== undefined) ? { type: "citation", raw: match[0], numbers } : undefined;
    },
    renderer(token: Tokens.Generic) {
      return (token["numbers"] as number[])
        .map(
          (number) =>
            `<button type="button" class="cite" data-number="${number}" aria-label="Passage ${number}: ${escape(titleOf(number) ?? "")}">${number}</button>`,
        )
        .join("");
    },
  };
}

/** Closes what the last block has left open, and holds back what cannot be shown yet, so that nothing flips when the rest arrives. */
export function heal(text: string): string {
  const start = text.lastIndexOf("\n\n") + 1;
  let tail = text.slice(start);
  if (isTableHead(tail)) return text.slice(0, start);
  // Code inside a list: its marks are its own.
  if (/^\s*(?:```|~~~)/m.test(tail)) return text;
  // A marker or a link that is not complete: `[`, `[1`, `[text`, `[text](addr`. Its text is shown, its address is not.
  tail = tail.replace(/!?\[([^\][\n]*)$/, (_, inner: string) => (/^[\d\s,]*$/.test(inner) ? "" : inner));
  tail = tail.replace(/!?\[([^\][\n]*)\]\([^)\n]*$/, "$1");
  if ((tail.match(/`/g)?.length ?? 0) % 2 === 1) return text.slice(0, start) + (tail.endsWith("`") ? tail.slice(0, -1) : `${tail}\``);
  const plain = tail.replace(/`[^`]*`/g, "");
  for (const mark of ["**", "~~"]) {
    if ((plain.split(mark).length - 1) % 2 === 1) tail = tail.endsWith(mark) ? tail.slice(0, -2) : closed(tail, mark);
  }
  const single = plain.replaceAll("**", "").match(/(?<=^|[^\w*])\*(?=\S)|(?<=\S)\*(?![\w*])/g)?.length ?? 0;
  if (single % 2 === 1 && !/^\s*\*\s/.test(tail)) tail = tail.endsWith("*") ? tail.slice(0, -1) : closed(tail, "*");
  return text.slice(0, start) + tail;
}

/** A closing mark must touch the text before it. */
function closed(tail: string, mark: string): string {
  const trimmed = tail.trimEnd();
  return trimmed + mark + tail.slice(trimmed.length);
}

function isTableHead(tail: string): boolean {
  const lines = tail.trimStart().split("\n");
  return lines.length <= 2 && /^\|/.test(lines[0] ?? "") && (lines.length === 1 || /^[|:\s-]*$/.test(lines[1] ?? ""));
}
