import { useSignal } from "@preact/signals";
import { memo } from "preact/compat";
import type { Answer } from "../answer";
import { answers, ask, askInstead, busy, openPassage, retry } from "../conversation";
import { offline } from "../network";
import { statementBefore } from "../support";
import type { Block } from "../markdown";
import { type Passage, type Problem, QUESTION_BYTES_MAX } from "../wire";
import { CopyButton, copyCode } from "./copy";
import { Warning } from "./icons";
import { Receipt } from "./receipt";
import { Steps } from "./steps";

export function Turn({ answer }: { answer: Answer }) {
  return (
    <article class="turn" aria-busy={answer.running.value}>
      <div class="turn-main">
        <Question answer={answer} />
        <Text answer={answer} />
        <Ending answer={answer} />
        <Sources answer={answer} />
        {answer.receipt.value && <Receipt receipt={answer.receipt.value} refresh={() => ask(answer.question, "refresh")} />}
        <Regenerate answer={answer} />
      </div>
      <Steps answer={answer} />
    </article>
  );
}

/** Whether a turn can be taken the place of: the last one, once it is kept. */
function replaceable(answer: Answer): boolean {
  return !busy.value && answers.value.at(-1) === answer && answer.phase.value === "done" && answer.id !== "" && answer.text.value !== "";
}

function Question({ answer }: { answer: Answer }) {
  const text = useSignal<string | undefined>(undefined);
  const close = () => (text.value = undefined);
  if (text.value === undefined || !replaceable(answer)) {
    return (
      <div class="asked">
        <h2 class="question">{answer.question}</h2>
        {replaceable(answer) && (
          <button type="button" class="quiet" onClick={() => (text.value = answer.question)}>
            Edit
          </button>
        )}
      </div>
    );
  }
  const tooLong = new TextEncoder().encode(text.value).length > QUESTION_BYTES_MAX;
  const send = () => {
    const question = text.value?.trim();
    if (question && !tooLong) void askInstead(answer, question);
  };
  return (
    <form
      class="edit"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
      onKeyDown={(event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          close();
        } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          send();
        }
      }}
    >
      <textarea aria-label="The question, edited" aria-invalid={tooLong} autofocus rows={2} value={text.value} onInput={(event) => (text.value = event.currentTarget.value)} />
      <span class="edit-end">
        <button type="submit" class="secondary" disabled={tooLong || text.value.trim() === ""}>
          Ask this instead
        </button>
        <button type="button" class="quiet" onClick={close}>
          Keep
        </button>
      </span>
    </form>
  );
}

function Regenerate({ answer }: { answer: Answer }) {
  if (!replaceable(answer)) return null;
  return (
    <p class="again">
      <button type="button" class="quiet" onClick={() => askInstead(answer, answer.question)}>
        Regenerate
      </button>
    </p>
  );
}

function Text({ answer }: { answer: Answer }) {
  const blocks = answer.blocks.value;
  const waiting = answer.running.value && blocks.length === 0;
  const click = (event: MouseEvent) => {
    // A block that is still growing may have been drawn anew under the pointer between press and release.
    const button =
      (event.target as Element).closest("button") ??
      (event.detail > 0 ? document.elementFromPoint(event.clientX, event.clientY)?.closest<HTMLButtonElement>(".answer button") : null);
    if (button?.dataset["copy"]) void copyCode(button);
    else if (button?.dataset["number"]) {
      openPassage.value = { answer, number: Number(button.dataset["number"]), statement: statementOf(button), opener: button };
    }
  };
  return (
    <div class={answer.running.value ? "answer growing" : "answer"} onClick={click}>
      {waiting && <p class="waiting">{answer.phase.value === "reconnecting" ? "Reconnecting…" : "Working on it…"}</p>}
      {blocks.map(({ key, html }) => (
        <Html key={key} html={html} />
      ))}
    </div>
  );
}

const Html = memo(({ html }: Pick<Block, "html">) => <div class="block" dangerouslySetInnerHTML={{ __html: html }} />);

/** The statement that a citation chip stands behind, without the numbers of other chips. */
function statementOf(chip: HTMLElement): string {
  const block = chip.closest("li, p, td, th, blockquote, h1, h2, h3, h4, h5, h6") ?? chip.parentElement;
  if (!block) return "";
  const range = document.createRange();
  range.setStart(block, 0);
  range.setEndBefore(chip);
  const before = range.cloneContents();
  for (const other of before.querySelectorAll(".cite")) other.remove();
  return statementBefore(before.textContent ?? "");
}

function Sources({ answer }: { answer: Answer }) {
  const passages = answer.passages.value;
  if (!passages.length || answer.phase.value === "asking") return null;
  const cited = answer.cited.value;
  return (
    <section class="sources" aria-label="Passages">
      <h3>
        Passages <span>{cited.size ? `${cited.size} of ${passages.length} cited` : `${passages.length} found`}</span>
      </h3>
      <ol>
        {passages.map((passage) => (
          <li key={passage.number}>
            <Source answer={answer} passage={passage} cited={cited.has(passage.number)} />
          </li>
        ))}
      </ol>
    </section>
  );
}

function Source({ answer, passage, cited }: { answer: Answer; passage: Passage; cited: boolean }) {
  const open = (event: MouseEvent) =>
    (openPassage.value = { answer, number: passage.number, statement: "", opener: event.currentTarget as HTMLElement });
  const heading = passage.heading_path.at(-1);
  const shown = openPassage.value?.answer === answer && openPassage.value.number === passage.number;
  return (
    <button type="button" class={cited ? "source cited" : "source"} aria-pressed={shown} onClick={open}>
      <span class="number">{passage.number}</span>
      <span class="source-text">
        <span class="source-title">{passage.title || passage.source_uri}</span>
        <span class="source-place">{heading && heading !== passage.title ? heading : passage.source_uri}</span>
      </span>
    </button>
  );
}

/** How an answer ended, when that needs saying; what had arrived stays above it. */
function Ending({ answer }: { answer: Answer }) {
  if (answer.phase.value === "reconnecting" && answer.text.value) {
    const notice = offline.value ? "You are offline. The answer goes on as soon as you are back." : "Connection lost. Going on from where it broke…";
    return <p class="notice">{notice}</p>;
  }
  if (answer.phase.value === "stopped") {
    return (
      <div class="notice">
        <span>Stopped.</span>
        <button type="button" class="link" disabled={busy.value} onClick={() => retry(answer)}>
          Ask again
        </button>
      </div>
    );
  }
  if (answer.phase.value === "failed" && answer.problem.value) return <Failure answer={answer} problem={answer.problem.value} />;
  const remark = remarkOn(answer);
  return remark ? <p class="notice">{remark}</p> : null;
}

function Failure({ answer, problem }: { answer: Answer; problem: Problem }) {
  return (
    <div class="notice bad" role="alert">
      <Warning />
      <div>
        <strong>{problem.title}</strong>
        {problem.detail && problem.detail !== problem.title && <p>{problem.detail}</p>}
        <div class="notice-end">
          <button type="button" class="secondary" disabled={busy.value} onClick={() => retry(answer)}>
            Retry
          </button>
          {answer.traceId.value && (
            <CopyButton text={answer.traceId.value} label="Copy the trace id">
              trace <code>{answer.traceId.value.slice(0, 8)}</code>
            </CopyButton>
          )}
        </div>
      </div>
    </div>
  );
}

function remarkOn(answer: Answer): string {
  const receipt = answer.receipt.value;
  if (answer.mismatch.value) return "The text on this page is not what the receipt says was sent. Ask again to be sure.";
  if (!receipt) return answer.problem.value ? `${answer.problem.value.title}. ${answer.problem.value.detail ?? ""}` : "";
  if (receipt.finish_reason === "max_tokens" || receipt.verdict === "cut") return "The answer reached its length limit and ends here.";
  if (receipt.finish_reason === "refusal" || receipt.verdict === "refused") return "The model declined to answer.";
  if (receipt.verdict === "empty") return "The model sent no text.";
  if (receipt.verdict === "citation_unknown") return "The answer cites a passage that it was not given.";
  return "";
}
