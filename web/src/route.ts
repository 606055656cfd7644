// Which of the two views is on show, kept in the fragment so that a reload and the back button work.
import { signal } from "@preact/signals";

export type View = "ask" | "documents";

const fromAddress = (): View => (location.hash === "#documents" ? "documents" : "ask");

export const view = signal<View>(fromAddress());

window.addEventListener("hashchange", () => (view.value = fromAddress()));
