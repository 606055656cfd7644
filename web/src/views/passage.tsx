import { useEffect, useMemo, useRef } from "preact/hooks";
import { openPassage } from "../conversation";
import { count } from "../format";
import { passageHtml } from "../passage_text";
import type { Passage } from "../wire";
import { copyCode } from "./copy";
import { Back, Close, Forward } from "./icons";

/** The passage behind a citation, beside the answer. Not modal: the answer stays readable and usable. */
export function PassagePanel() {
  const panel = useRef<HTMLDivElement>(null);
  const open = openPassage.value;
  const passage = open?.answer.passage(open.number);
  const opener = open?.opener;
  useEffect(() => {
    if (!opener) return;
    panel.current?.focus();
    // The conversation makes room for the panel, which may move the citation out of sight.
    opener.scrollIntoView({ block: "nearest" });
    return () => (opener.isConnected ? opener : document.getElementById("question"))?.focus();
  }, [opener]);
  useEffect(() => {
    const text = panel.current?.querySelector("mark") ?? panel.current?.querySelector(".passage-text");
    text?.scrollIntoView({ block: "nearest" });
  }, [open]);
  if (!open || !passage) return null;
  const { answer, number } = open;
  const flags = passage.flags ?? []; // an answer this browser kept may be older than the field
  const [top, ...below] = passage.heading_path;
  const path = top === passage.title ? below : passage.heading_path;
  const show = (other: number) => (openPassage.value = { ...open, number: other, statement: "" });
  return (
    <div class="panel" role="dialog" aria-labelledby="passage-title" tabIndex={-1} ref={panel}>
      <div class="panel-head">
        <span class="number">{number}</span>
        <span class="panel-where">
          of {answer.passages.value.length}
        </span>
        <button type="button" class="quiet" disabled={!answer.passage(number - 1)} onClick={() => show(number - 1)} aria-label="Previous passage">
          <Back />
        </button>
        <button type="button" class="quiet" disabled={!answer.passage(number + 1)} onClick={() => show(number + 1)} aria-label="Next passage">
          <Forward />
        </button>
        <button type="button" class="quiet panel-close" onClick={() => (openPassage.value = undefined)} aria-label="Close the passage" title="Close (Esc)">
          <Close />
        </button>
      </div>
      <div class="panel-body">
        <h2 id="passage-title">{passage.title || passage.source_uri}</h2>
        {path.length > 0 && <p class="path">{path.join(" › ")}</p>}
        {flags.length > 0 && (
          <p class="flagged" role="note">
            This passage looks like an instruction to the model ({flags.join(", ").replaceAll("_", " ")}). It is treated as text, and the
            answer was not kept for others.
          </p>
        )}
        <Text passage={passage} statement={open.statement} />
        <Facts passage={passage} />
      </div>
    </div>
  );
}

function Text({ passage, statement }: { passage: Passage; statement: string }) {
  const html = useMemo(() => passageHtml(passage, statement), [passage, statement]);
  const click = (event: MouseEvent) => {
    const button = (event.target as Element).closest<HTMLElement>("[data-copy]");
    if (button) void copyCode(button);
  };
  return (
    <div
      class="passage-text block"
      tabIndex={0}
      role="region"
      aria-label="Text of the passage"
      onClick={click}
      dangerouslySetInnerHTML={{ __html: html }}
    />
  );
}

function Facts({ passage }: { passage: Passage }) {
  return (
    <dl class="facts">
      <dt>Source</dt>
      <dd>{passage.source_uri}</dd>
      {(passage.page ?? 0) > 0 && (
        <>
          <dt>Page</dt>
          <dd>{count(passage.page ?? 0)}</dd>
        </>
      )}
      <dt>Characters</dt>
      <dd>
        {count(passage.start)}–{count(passage.end)}
      </dd>
      <dt>Version</dt>
      <dd>{passage.document_version}</dd>
      <dt>Score</dt>
      <dd>{passage.score.toFixed(4)}</dd>
    </dl>
  );
}
