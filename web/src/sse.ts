// Server-sent events over fetch, because EventSource can neither ask a question nor tell a refusal from a broken connection.

export interface ServerEvent {
  name: string;
  id: string;
  data: string;
}

/** Silence after which a connection counts as dead. The gateway sends a comment every 15 s. */
const SILENCE_MS = 45_000;

/** Largest single event; a stream that exceeds it is not ours. */
const EVENT_CHARACTERS_MAX = 8 * 1024 * 1024;

/** Yields each event of a response as it arrives and returns when the stream closes, for whatever reason it did. */
export async function* events(response: Response): AsyncGenerator<ServerEvent, void, void> {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new Parser();
  try {
    for (;;) {
      const { done, value } = await withinSilence(reader);
      if (done) return;
      yield* parser.feed(value);
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

async function withinSilence(reader: ReadableStreamDefaultReader<string>) {
  let timer = 0;
  const silence = new Promise<never>((_, reject) => {
    timer = window.setTimeout(() => reject(new TypeError("The connection went silent")), SILENCE_MS);
  });
  try {
    return await Promise.race([reader.read(), silence]);
  } finally {
    window.clearTimeout(timer);
  }
}

/** The line protocol of the HTML standard, section 9.2.6; an event that is cut off by the end of the stream is dropped. */
export class Parser {
  #rest = "";
  #name = "";
  #id = "";
  #data: string[] = [];

  *feed(chunk: string): Generator<ServerEvent, void, void> {
    this.#rest += chunk;
    if (this.#rest.length > EVENT_CHARACTERS_MAX) throw new TypeError("The stream is not a stream of events");
    // A carriage return at the very end may be the first half of a line break.
    for (let match; (match = /\r\n|\n|\r(?!$)/.exec(this.#rest)); ) {
      const line = this.#rest.slice(0, match.index);
      this.#rest = this.#rest.slice(match.index + match[0].length);
      const event = this.#line(line);
      if (event) yield event;
    }
  }

  #line(line: string): ServerEvent | undefined {
    if (line === "") {
      const event = { name: this.#name || "message", id: this.#id, data: this.#data.join("\n") };
      const complete = this.#data.length > 0;
      this.#name = "";
      this.#data = [];
      return complete ? event : undefined;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.#name = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id" && !value.includes("\0")) this.#id = value;
    return undefined;
  }
}
