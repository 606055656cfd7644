// Which of the views is on show, kept in the fragment so that a reload and the back button work.
import { signal } from "@preact/signals";

export type View = "ask" | "documents" | "conversations";

const VIEWS: Record<string, View> = { "#documents": "documents", "#conversations": "conversations" };

const fromAddress = (): View => VIEWS[location.hash] ?? "ask";

export const view = signal<View>(fromAddress());

window.addEventListener("hashchange", () => (view.value = fromAddress()));
