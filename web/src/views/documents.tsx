import { useEffect, useRef } from "preact/hooks";
import { useSignal } from "@preact/signals";
import { problemOf } from "../api";
import {
  add,
  clearEnded,
  documents,
  documentsProblem,
  documentsState,
  loadMore,
  nextPage,
  refresh,
  remove,
  type Upload,
  uploads,
} from "../documents";
import { bytes, count, day, plural } from "../format";
import type { StoredDocument } from "../wire";
import { Close, Upload as UploadIcon } from "./icons";

export function DocumentsView() {
  useEffect(() => void refresh(), []);
  return (
    <main class="documents">
      <h1>Documents</h1>
      <DropZone />
      {uploads.value.length > 0 && <Uploads />}
      <List />
    </main>
  );
}

function DropZone() {
  const input = useRef<HTMLInputElement>(null);
  const over = useSignal(false);
  const drop = (event: DragEvent) => {
    event.preventDefault();
    over.value = false;
    if (event.dataTransfer) add(event.dataTransfer.files);
  };
  const choose = () => {
    if (!input.current?.files) return;
    add(input.current.files);
    input.current.value = "";
  };
  return (
    <div
      class={over.value ? "drop over" : "drop"}
      onDragOver={(event) => {
        event.preventDefault();
        over.value = true;
      }}
      onDragLeave={() => (over.value = false)}
      onDrop={drop}
    >
      <UploadIcon />
      <p>
        Drop files here or{" "}
        <button type="button" class="link" onClick={() => input.current?.click()}>
          choose files
        </button>
      </p>
      <p class="fine">PDF, Office, OpenDocument, EPUB, mail, Markdown, HTML, tables, data and code, up to 20 MB each. The same file again becomes a new version.</p>
      <input ref={input} type="file" multiple hidden aria-label="Files to add" onChange={choose} />
    </div>
  );
}

function Uploads() {
  const ended = uploads.value.filter((one) => one.ended.value).length;
  return (
    <section class="uploads" aria-label="Uploads">
      <h2>
        Uploads{" "}
        <span>
          {ended} of {uploads.value.length} ended
        </span>
        {ended > 0 && (
          <button type="button" class="link" onClick={clearEnded}>
            Clear
          </button>
        )}
      </h2>
      <ul>
        {uploads.value.map((upload) => (
          <UploadRow key={upload} upload={upload} />
        ))}
      </ul>
    </section>
  );
}

const STAGES: Record<string, { text: string; part: number }> = {
  waiting: { text: "Waiting", part: 0 },
  held: { text: "Waiting for its turn", part: 0 },
  sending: { text: "Sending", part: 0.08 },
  received: { text: "Received", part: 0.2 },
  parsed: { text: "Read", part: 0.3 },
  chunked: { text: "Embedding", part: 0.4 },
  embedded: { text: "Embedding", part: 0.4 },
  indexed: { text: "Indexed", part: 1 },
  unchanged: { text: "Already indexed", part: 1 },
  failed: { text: "Failed", part: 1 },
  cancelled: { text: "Cancelled", part: 1 },
};

function UploadRow({ upload }: { upload: Upload }) {
  const state = upload.state.value;
  const { done, total } = upload.chunks.value;
  const stage = STAGES[state] ?? { text: state, part: 0 };
  const part = !upload.ended.value && total > 0 ? 0.4 + (0.55 * done) / total : stage.part;
  const text = !upload.ended.value && total > 0 && done === total ? "Storing" : stage.text;
  const chunks = total > 0 ? (upload.ended.value ? plural(total, "chunk") : `${count(done)} of ${plural(total, "chunk")}`) : "";
  return (
    <li class={`upload ${state}`}>
      <span class="upload-name">{upload.name}</span>
      <span class="upload-size">{bytes(upload.bytes)}</span>
      <span class="upload-stage" role="status">
        {text}
        {chunks && ` · ${chunks}`}
      </span>
      {!upload.ended.value && (
        <button type="button" class="quiet" aria-label={`Cancel ${upload.name}`} onClick={() => upload.cancel()}>
          <Close />
        </button>
      )}
      <svg class="bar" width="100%" height="3" aria-hidden="true">
        <rect class="bar-ground" width="100%" height="3" rx="1.5" />
        <rect class="bar-fill" width={`${(100 * part).toFixed(1)}%`} height="3" rx="1.5" />
      </svg>
      <Unread pages={upload.unreadPages.value} />
      {upload.failure.value && <p class="upload-failure">{upload.failure.value}</p>}
    </li>
  );
}

/** What is missing of a document that was taken in all the same. */
function Unread({ pages }: { pages: string }) {
  if (!pages) return null;
  const one = /^\d+$/.test(pages);
  return (
    <p class="unread">
      {one ? `Page ${pages} is a picture and was not read: nothing on it will be found` : `Pages ${pages} are pictures and were not read: nothing on them will be found`}
    </p>
  );
}

function List() {
  if (documentsState.value === "failed") {
    return (
      <div class="notice bad" role="alert">
        <strong>{documentsProblem.value?.title}</strong>
        <p>{documentsProblem.value?.detail}</p>
        <button type="button" class="secondary" onClick={refresh}>
          Retry
        </button>
      </div>
    );
  }
  if (documentsState.value !== "ready") return <p class="fine">Loading…</p>;
  if (!documents.value.length) return <p class="fine">Nothing is indexed yet.</p>;
  return (
    <section aria-label="Indexed documents">
      <h2>
        Indexed <span>{nextPage.value ? `first ${count(documents.value.length)}` : plural(documents.value.length, "document")}</span>
      </h2>
      <ul class="rows">
        {documents.value.map((document) => (
          <DocumentRow key={document.document_id} document={document} />
        ))}
      </ul>
      {nextPage.value && (
        <button type="button" class="secondary" onClick={loadMore}>
          Show more
        </button>
      )}
    </section>
  );
}

function DocumentRow({ document }: { document: StoredDocument }) {
  const asking = useSignal(false);
  const working = useSignal(false);
  const failure = useSignal("");
  const drop = async () => {
    working.value = true;
    failure.value = "";
    try {
      await remove(document);
    } catch (error) {
      const problem = problemOf(error);
      failure.value = problem.detail || problem.title;
      working.value = false;
      asking.value = false;
    }
  };
  return (
    <li class="row">
      <div class="row-main">
        <span class="row-title">{document.title || document.source_uri}</span>
        <span class="row-facts">
          {document.source_uri !== document.title && <span class="row-uri">{document.source_uri}</span>}
          <span>{plural(document.chunks, "chunk")}</span>
          <span>{bytes(Number(document.bytes))}</span>
          <span>version {document.version}</span>
          <span>{day(document.indexed_at)}</span>
          {document.collection && document.collection !== "default" && <span class="tag">{document.collection}</span>}
        </span>
        <Unread pages={document.unread_pages} />
        {failure.value && <p class="upload-failure">{failure.value}</p>}
      </div>
      {asking.value ? (
        <span class="row-sure">
          <button type="button" class="danger" disabled={working.value} onClick={drop} autofocus>
            {working.value ? "Deleting…" : "Delete for good"}
          </button>
          <button type="button" class="quiet" disabled={working.value} onClick={() => (asking.value = false)}>
            Keep
          </button>
        </span>
      ) : (
        <button type="button" class="quiet" aria-label={`Delete ${document.title || document.source_uri}`} onClick={() => (asking.value = true)}>
          Delete
        </button>
      )}
    </li>
  );
}
