// Whether this browser has a network at all, and what to tell a person when nothing answers.
import { signal } from "@preact/signals";
import type { Problem } from "./wire";

export const offline = signal(!navigator.onLine);
const update = () => (offline.value = !navigator.onLine);
addEventListener("online", update);
addEventListener("offline", update);

/** What a request that nobody answered means to the person who made it. */
export function unreachable(): Problem {
  update();
  return offline.value
    ? { title: "You are offline", detail: "Nothing was lost. Try again once you are connected.", retryable: true }
    : { title: "Tailrace cannot be reached", detail: "It may be starting again, or your connection may be broken. Try again in a moment.", retryable: true };
}

/** Resolves at once, or when an offline browser has a network again. */
export function connected(signal: AbortSignal): Promise<void> {
  update();
  if (!offline.value) return Promise.resolve();
  return new Promise((resolve) => {
    const settle = () => {
      window.removeEventListener("online", settle);
      signal.removeEventListener("abort", settle);
      resolve();
    };
    window.addEventListener("online", settle);
    signal.addEventListener("abort", settle);
  });
}
